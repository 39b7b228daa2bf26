"""The commands of ``sdonnx``, one module for each or for a group; app.py registers them."""
