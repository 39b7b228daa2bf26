"""OpenVINO models for the benchmarks: convert a checkpoint's U-Net and VAE, quantize them, run them in sdonnx' loop.

int8 is what optimum-intel's OVQuantizationConfig makes of a Stable Diffusion pipeline: the U-Net's weights and
activations by NNCF with SmoothQuant, the VAE's weights alone.
"""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OPTIONS = {
    "f32": {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"},
    "default": {"PERFORMANCE_HINT": "LATENCY"},
}
"""By what is computed in unless quantized; by default OpenVINO uses bfloat16 on CPUs that have it."""

Feeds = Mapping[str, np.ndarray]


class OpenVinoSession:
    """An OpenVINO model with the interface of `Session`; compiled once for each set of input shapes."""

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]] | None = None, *, compute: str = "f32") -> None:
        """Compile for these shapes of the inputs; None compiles at the first run.

        Args:
            path: the model.
            shapes: those of its inputs, by name.
            compute: a key of OPTIONS.
        """
        self._path, self._options = path, OPTIONS[compute]
        self.device, self.compute = "openvino", "f32"
        self._compiled: dict[tuple[Any, ...], Any] = {}
        if shapes is not None:
            self._compile(shapes)

    def _compile(self, shapes: Mapping[str, Sequence[int]]) -> Any:
        import openvino

        key = tuple((name, *shape) for name, shape in sorted(shapes.items()))
        if key not in self._compiled:
            core = openvino.Core()
            model = core.read_model(self._path)
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            self._compiled[key] = core.compile_model(model, "CPU", self._options)
            hint = self._compiled[key].get_property("INFERENCE_PRECISION_HINT")
            self.compute = {"bfloat16": "bf16", "float16": "f16"}.get(hint.to_string(), "f32")
        return self._compiled[key]

    def is_open_for(self, _feeds: Feeds) -> bool:
        return False

    def open_for(self, feeds: Feeds) -> None:
        self._compile({name: value.shape for name, value in repeat_latents(feeds).items()})

    def run(self, feeds: Feeds, _keep: Container[str] = ()) -> dict[str, np.ndarray]:
        inputs = repeat_latents(feeds)
        model = self._compile({name: value.shape for name, value in inputs.items()})
        return {"output": np.array(model(inputs)[0])}

    def cancel(self) -> None:
        """Do nothing: OpenVINO's synchronous runs can't be cancelled."""


def repeat_latents(feeds: Feeds) -> dict[str, np.ndarray]:
    """Repeat the latents to the batch size of the text, which sdonnx' graphs do themselves."""
    inputs = dict(feeds)
    if "encoder_hidden_states" in inputs:
        times = len(inputs["encoder_hidden_states"]) // len(inputs["sample"])
        inputs["sample"] = np.concatenate([inputs["sample"]] * times)
    return inputs


def model_opener(models: Mapping[str, Path], compute: str = "f32") -> Any:
    """Make an ``open_model`` for `Pipeline` that opens these OpenVINO models in place of the components' graphs."""
    from sdonnx_runtime.execution.staged_model import open_model

    def open_either(path: Path, *arguments: Any, **options: Any) -> Any:
        model = models.get(path.parent.name)
        return open_model(path, *arguments, **options) if model is None else OpenVinoSession(model, compute=compute)

    return open_either


def convert(checkpoint: Path, component: str, path: Path, *, vae: str = "vae", compress_to_fp16: bool = False) -> None:
    """Convert a component of a diffusers checkpoint, whose VAE is in ``vae``, from torch with dynamic shapes."""
    import openvino
    import torch
    from diffusers import AutoModel

    part = checkpoint / ("unet" if component == "unet" else vae)

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(str(part), torch_dtype=torch.float32).eval()

    class UNet(Traced):
        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    class XlUNet(Traced):
        def forward(
            self, sample: Any, timestep: Any, encoder_hidden_states: Any, text_embeds: Any, time_ids: Any
        ) -> Any:
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
            return self.model(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]

    class Decoder(Traced):
        def forward(self, latent_sample: Any) -> Any:
            return self.model.decode(latent_sample, return_dict=False)[0]

    config = json.loads((part / "config.json").read_text())
    is_xl = config.get("addition_embed_type") is not None
    module = Decoder() if component != "unet" else XlUNet() if is_xl else UNet()
    sample = torch.randn(2, 4, 16, 16)
    example = {"latent_sample": sample}
    if component == "unet":
        text = torch.randn(2, 8, config["cross_attention_dim"])
        example = {"sample": sample, "timestep": torch.tensor(500.0), "encoder_hidden_states": text}
        sizes = 6 * config.get("addition_time_embed_dim", 0)
        width = config.get("projection_class_embeddings_input_dim", 0) - sizes
        example |= {"text_embeds": torch.randn(2, width), "time_ids": torch.ones(2, 6)} if is_xl else {}
    shapes = {name: [-1, 4, -1, -1] if value is sample else [-1] * value.ndim for name, value in example.items()}
    if component == "unet":
        shapes["encoder_hidden_states"][2] = config["cross_attention_dim"]
        shapes |= {"text_embeds": [-1, width], "time_ids": [-1, 6]} if is_xl else {}
    with torch.no_grad():
        model = openvino.convert_model(module, example_input=example)
    model.reshape(shapes)
    model.outputs[0].get_tensor().set_names({"sample"})  # optimum-intel finds it by a name
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, path, compress_to_fp16=compress_to_fp16 or is_xl)  # XL's checkpoint is fp16 already


def quantize(source: Path, feeds: Sequence[Feeds], path: Path) -> None:
    """Quantize a U-Net's weights and activations to int8, calibrated on ``feeds``."""
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    quantized = nncf.quantize(
        model,
        nncf.Dataset([repeat_latents(each) for each in feeds]),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.DISABLE),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(quantized, path, compress_to_fp16=False)


def compress(source: Path, path: Path) -> None:
    """Quantize a model's weights to int8."""
    import nncf
    import openvino

    compressed = nncf.compress_weights(openvino.Core().read_model(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(compressed, path, compress_to_fp16=False)
