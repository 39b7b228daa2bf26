"""LoRA, LyCORIS and textual inversion: files to weight deltas, merged when a model is opened."""
