"""Checkpoints in every published layout, read lazily under diffusers' names."""
