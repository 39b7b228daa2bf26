"""Single-file checkpoints in the original (LDM) layout."""
