"""ONNX files, read without the onnx package: nodes, weights, shapes, stages."""
