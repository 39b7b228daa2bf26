"""Output files: PNG with metadata, saved latents, atomic writes."""
