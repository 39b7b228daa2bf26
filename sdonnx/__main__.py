"""``python -m sdonnx``: the command line."""

from sdonnx.cli.app import main

main()
