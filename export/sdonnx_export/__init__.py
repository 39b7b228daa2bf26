"""The exporter: published checkpoints to sdonnx packages, without torch."""
