"""Untrusted files: what they are, and tensors in safetensors and in torch's pickles, without torch.

- kinds: what a file is that can't be read; dtypes: conversion of stored elements.
- tensor_file: `TensorFile`; tensors: `open_tensors`, which tells the formats by content.
- safetensors; torch_file: the two formats; pickles, state_dict: a pickle as data, nothing of it executed.
- arrays_file: numpy's ``.npz``; json_file: small JSON files.
"""
