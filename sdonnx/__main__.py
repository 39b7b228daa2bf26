"""``python -m sdonnx`` is the command line."""

from sdonnx.cli import main

main()
