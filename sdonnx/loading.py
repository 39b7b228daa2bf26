"""Finding a model by what a person calls it: a directory, a bundled model's name, or a Hub id."""

import re
from collections.abc import Sequence
from pathlib import Path

from sdonnx_models import Recipe, bundled, recipes
from sdonnx_runtime.adapters.lora import AnyLora
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.memory.budget import AUTO
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.txt", "*.onnx", "*.onnx_data", "*.onnx.data")


def load(
    model: str | Path,
    *,
    vae: str | Path | None = None,
    preview_vae: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory: str | int = AUTO,
    refiner: str | Path | None = None,
    loras: Sequence[AnyLora] = (),
    lora_folder: str | Path | None = None,
    embeddings: Sequence[Path | str | tuple[Path | str, str | None]] = (),
    controls: Sequence[str | Path] = (),
) -> Pipeline:
    """Opens a package; its components are loaded when they are first needed.

    Args:
        model: a package's or an optimum export's directory, the name of a bundled model, or a Hub id of one.
        vae: a package, of a VAE alone or whole, whose VAE encodes and decodes instead.
        preview_vae: a package whose VAE (a tiny one, say) makes the pictures of `Progress.preview`, in full size.
        device: auto (the best there is), cuda, directml or cpu.
        threads: CPU threads; None is one for each physical core.
        memory: what the process may take, in bytes or such as "600MB" or "2GiB"; "auto" is what is free, "max" keeps
            all loaded for many pictures in a row, "min" is as little as there is a way to.
        refiner: another package, named as ``model`` is, whose U-Net takes the last steps, such as SDXL's refiner.
        loras: files of adapters, each with its scale where that isn't 1; see `Pipeline.set_loras`.
        lora_folder: where the adapters are that prompts name, as ``<lora:name:0.8>``.
        embeddings: files of textual inversion, each with its word where that isn't the file's own; see
            `Pipeline.set_embeddings`.
        controls: packages of ControlNets and T2I-Adapters, named as ``model`` is; a request has a `Control` for each.

    Raises:
        PackageError: there is no such package, it is damaged, a VAE has other latents than it, or the refiner or a
            control doesn't go with it.
        RequestError: ``threads`` is out of its range, ``memory`` is no size, or a file of adapters or of a textual
            inversion is damaged or for another model.
    """
    package = Package.open(find_model(model))
    pipeline = Pipeline(
        package if vae is None else package.with_vae(Package.open(find_model(vae))),
        preview_vae=None if preview_vae is None else Package.open(find_model(preview_vae)),
        device=device,
        threads=threads,
        memory=memory,
        refiner=None if refiner is None else Package.open(find_model(refiner)),
        lora_folder=None if lora_folder is None else Path(lora_folder),
        controls=[Package.open(find_model(control)) for control in controls],
    )
    pipeline.set_loras(loras)
    pipeline.set_embeddings(embeddings)
    return pipeline


def find_model(model: str | Path) -> Path:
    """The directory of a package; one on the Hub is downloaded, or taken from the Hub's cache.

    Raises:
        PackageError: there is none of that name.
    """
    path = Path(model)
    if path.exists():
        return path
    name = str(model)
    known = bundled()
    if name in known:
        return known[name]
    if isinstance(model, str) and _HUB_ID.fullmatch(name):
        return _from_hub(name)
    if name in recipes():
        raise PackageError(f"there is no package '{name}' here yet; make it: sdonnx export {name}, then -m {name}-onnx")
    raise PackageError(f"there is no model '{name}': no such directory, bundled model or Hub id; check its spelling")


def find_source(source: str) -> tuple[str, Recipe | None]:
    """What an export is of: a path or a Hub id, and the recipe if one was named; a bundled model is its package."""
    if Path(source).exists():
        return source, None
    recipe, package = recipes().get(source), bundled().get(source)
    found = source if package is None else str(package)
    return (found, None) if recipe is None else (recipe.source, recipe)


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise PackageError(f"'{name}' is no directory here; to look on the Hub, pip install huggingface-hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PackageError(f"'{name}' is no directory here, and the Hub did not give it: {reason}") from None
