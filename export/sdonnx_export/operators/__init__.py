"""ONNX operators that models are written with, for each precision."""
