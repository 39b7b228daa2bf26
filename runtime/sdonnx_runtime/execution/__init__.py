"""ONNX Runtime sessions and how components run on them: whole, in stages, in tiles."""
