"""The commands of ``sdonnx``, a module for each group; cli.py puts them together."""
