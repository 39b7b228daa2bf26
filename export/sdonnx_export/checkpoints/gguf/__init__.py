"""GGUF, the format of ggml: a header of metadata and tensors, and the tensors' elements in blocks.

- reader: `open_gguf`; blocks: the types of tensors, and their exact conversion to float32.
"""
