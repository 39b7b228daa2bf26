"""The models, written as onnxscript modules."""
