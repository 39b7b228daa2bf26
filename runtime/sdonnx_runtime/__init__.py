"""The torch-free runtime of sdonnx; `import sdonnx` is its public face."""
