"""The exporter: published checkpoints to sdonnx packages, without torch.

General layout, from the bottom up:

- checkpoint_model: Weight, Part, Checkpoint; optimum_export: the optimum route, which uses torch; hub: downloads.
- operators: the ONNX operators that layers are written in, for each precision.
- models: the U-Net, VAEs, CLIP, controls and IP-Adapters in `onnxscript.nn`; parameter names are checkpoint keys.
- checkpoints: reading every published layout into a `Checkpoint`.
- packaging: writing and verifying a package.
- quantization: calibration of int8 and the sensitivity of layers.
- export: the use case.
"""
