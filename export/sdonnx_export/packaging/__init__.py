"""Writing and checking packages."""
