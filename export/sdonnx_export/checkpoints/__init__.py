"""Read checkpoints of every published layout lazily, under diffusers' names."""
