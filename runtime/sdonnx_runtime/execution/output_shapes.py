"""The outputs that a package's components must have: a graph may be damaged, or another than the manifest says."""

from collections.abc import Mapping

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.execution.running.device_array import Tensor
from sdonnx_runtime.packages.manifest import Latents
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import CACHED_FEATURES

Values = Mapping[str, Tensor]
"""Inputs or outputs by name."""


def check_outputs(package: Package, component: str, feeds: Values, outputs: Values) -> None:
    """Check what a component of a package returned for its inputs.

    Raises:
        PackageError: outputs are missing, are too many, or have another shape.
    """
    for encoder in package.manifest.text_encoders:
        if component == encoder.component and "input_ids" in feeds:
            count, tokens = feeds["input_ids"].shape
            _check_output(package, component, outputs, encoder.output, (count, tokens, None))
            if encoder.pooled is not None:
                _check_output(package, component, outputs, encoder.pooled, (count, None))
    shape = _image_shape(component, feeds, package.manifest.latents)
    if shape is not None:
        name, *others = [name for name in outputs if name != CACHED_FEATURES] or [""]
        if others:
            raise PackageError(f"{package.root}: {component} has {len(outputs)} outputs; expected one; export again")
        _check_output(package, component, outputs, name, shape)


def _image_shape(component: str, feeds: Values, space: Latents) -> tuple[int | None, ...] | None:
    """The shape of the output of a U-Net or half of a VAE, None for an axis of any size; None for other components."""
    image = feeds.get("latent_sample" if component == "vae_decoder" else "sample")
    if image is None or component not in ("unet", "vae_decoder", "vae_encoder"):
        return None
    count, _, height, width = image.shape
    if component == "unet":
        return max(count, len(feeds.get("encoder_hidden_states", ()))), space.channels, height, width
    if component == "vae_decoder":
        return count, 3, height * space.downscale, width * space.downscale
    return count, None, height // space.downscale, width // space.downscale


def _check_output(
    package: Package, component: str, outputs: Values, name: str, shape: tuple[int | None, ...]
) -> None:  # fmt: skip
    if name not in outputs:
        raise PackageError(
            f"{package.root}: {component} has no output '{name}' (it has {', '.join(outputs) or 'none'}); export again"
        )
    found = outputs[name].shape
    if len(found) != len(shape) or any(size not in (None, own) for own, size in zip(found, shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise PackageError(f"{package.root}: {component}'s '{name}' is {found}; expected ({expected}); export again")
