"""How files come to be whole or not at all: staging directories, and renames that the standard library lacks."""
