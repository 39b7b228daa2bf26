"""``python -m sdonnx`` is the command line."""

from sdonnx.cli.app import main

main()
