"""Calibration for int8, and which layers suffer from quantization."""
