"""``sdonnx bench``: measure time and memory of a package."""
