"""OpenVINO's side of the benches: a checkpoint's U-Net and VAE decoder as its models, made int8 and run in our loop.

    python bench/openvino_models.py DIR                             # pictogram: DIR/fp32/unet.xml, DIR/int8/unet.xml
    python bench/quality.py --unet DIR/int8/unet.xml --reference pictogram

int8 is what optimum-intel's OVQuantizationConfig makes of a Stable Diffusion pipeline: the U-Net's weights and
activations by NNCF with SmoothQuant, the VAE's weights alone.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
"""float32 where nothing is quantized, as everybody else computes; CPUs with bfloat16 would use that."""

Feeds = Mapping[str, np.ndarray]


class OpenVinoSession:
    """A model in OpenVINO, with what our loop asks of a session; compiled for the shapes that it is given."""

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        """``shapes`` are each input's, where they are known beforehand; else the first run finds them."""
        self._path = path
        self._compiled: dict[tuple[Any, ...], Any] = {}
        if shapes is not None:
            self._model(shapes)

    def _model(self, shapes: Mapping[str, Sequence[int]]) -> Any:
        import openvino

        key = tuple((name, *shape) for name, shape in sorted(shapes.items()))
        if key not in self._compiled:
            core = openvino.Core()
            model = core.read_model(self._path)
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            self._compiled[key] = core.compile_model(model, "CPU", OPTIONS)
        return self._compiled[key]

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        given = whole(feeds)
        model = self._model({name: value.shape for name, value in given.items()})
        return {"output": np.array(model(given)[0])}

    def cancel(self) -> None:
        """OpenVINO's synchronous runs can't be stopped."""


def whole(feeds: Feeds) -> dict[str, np.ndarray]:
    """A row of latents for each row of text, which our graphs do without."""
    given = dict(feeds)
    if "encoder_hidden_states" in given:
        times = len(given["encoder_hidden_states"]) // len(given["sample"])
        given["sample"] = np.concatenate([given["sample"]] * times)
    return given


def attach(pipe: Any, models: Mapping[str, Path]) -> None:
    """Lets OpenVINO run some of a pipeline's components."""
    from sdonnx_runtime.execution.components import Components
    from sdonnx_runtime.execution.session import Session

    def opened(path: Path, *_: object) -> Any:
        model = models.get(path.parent.name)
        return Session(path, device="cpu") if model is None else OpenVinoSession(model)

    pipe._components = Components(pipe.package, opened, keep_loaded=pipe._components._keep_loaded)


def convert(checkpoint: Path, component: str, path: Path) -> None:
    """A component of a diffusers checkpoint by OpenVINO's own reading of torch, float32, with shapes left open."""
    import openvino
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind, part = (UNet2DConditionModel, "unet") if component == "unet" else (AutoencoderKL, "vae")
            self.model = kind.from_pretrained(checkpoint / part, torch_dtype=torch.float32).eval()

    class UNet(Traced):
        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    class XlUNet(Traced):
        def forward(
            self, sample: Any, timestep: Any, encoder_hidden_states: Any, text_embeds: Any, time_ids: Any
        ) -> Any:
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
            given = sample, timestep, encoder_hidden_states
            return self.model(*given, added_cond_kwargs=added, return_dict=False)[0]

    class Decoder(Traced):
        def forward(self, latent_sample: Any) -> Any:
            return self.model.decode(latent_sample, return_dict=False)[0]

    config = json.loads((checkpoint / ("unet" if component == "unet" else "vae") / "config.json").read_text())
    large = config.get("addition_embed_type") is not None
    module = Decoder() if component != "unet" else XlUNet() if large else UNet()
    sample = torch.randn(2, 4, 16, 16)
    example = {"latent_sample": sample}
    if component == "unet":
        text = torch.randn(2, 8, config["cross_attention_dim"])
        example = {"sample": sample, "timestep": torch.tensor(500.0), "encoder_hidden_states": text}
        sizes = 6 * config.get("addition_time_embed_dim", 0)
        width = config.get("projection_class_embeddings_input_dim", 0) - sizes
        example |= {"text_embeds": torch.randn(2, width), "time_ids": torch.ones(2, 6)} if large else {}
    shapes = {name: [-1, 4, -1, -1] if value is sample else [-1] * value.ndim for name, value in example.items()}
    if component == "unet":
        shapes["encoder_hidden_states"][2] = config["cross_attention_dim"]
        shapes |= {"text_embeds": [-1, width], "time_ids": [-1, 6]} if large else {}
    with torch.no_grad():
        model = openvino.convert_model(module, example_input=example)
    model.reshape(shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, path, compress_to_fp16=large)  # its checkpoint is of float16 already


def quantize(source: Path, feeds: Sequence[Feeds], path: Path) -> None:
    """A U-Net's weights and activations in int8, calibrated on ``feeds``."""
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    made = nncf.quantize(
        model,
        nncf.Dataset([whole(each) for each in feeds]),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.DISABLE),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(made, path, compress_to_fp16=False)


def compress(source: Path, path: Path) -> None:
    """A model's weights in int8."""
    import nncf
    import openvino

    made = nncf.compress_weights(openvino.Core().read_model(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(made, path, compress_to_fp16=False)


def trajectories(package: str, pictures: int) -> list[Feeds]:
    """What the U-Net is given while it draws some of the judge's captions, with seeds that the judge doesn't use."""
    from quality import FIRST_SEED, Judge

    import sdonnx
    from sdonnx.benchmark.worker import measure_image
    from sdonnx.loading import find_model

    opened = sdonnx.Package.open(find_model(package))
    pipe = sdonnx.Pipeline(opened)
    cases = Judge().cases(pictures)
    requests = [pipe.check(case.caption, seed=case.seed - FIRST_SEED) for case in cases]
    made = [measure_image(opened, request, "cpu", None) for request in requests]
    return [call.inputs for picture in made for call in picture.calls["unet"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--pictures", type=int, default=12, help="trajectories to calibrate on")
    args = parser.parse_args()
    source, target = (args.directory / precision / "unet.xml" for precision in ("fp32", "int8"))
    convert(Path(__file__).parents[1] / "models" / "pictogram" / "checkpoint", "unet", source)
    quantize(source, trajectories("pictogram", args.pictures), target)
    print(f"{target}: pictogram's U-Net in int8")


if __name__ == "__main__":
    main()
