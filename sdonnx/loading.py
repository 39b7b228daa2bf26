"""Find a model by its directory, its bundled name or its Hub id, and load it."""

from collections.abc import Sequence
from pathlib import Path

from sdonnx_models import Recipe, bundled, recipes
from sdonnx_runtime.adapters.lora import AnyLora
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.memory.budget import AUTO
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline
from sdonnx_runtime.storage.staging import remove_stale
from sdonnx_runtime.upscaler import Upscaler

_HUB_FILES = ("*.json", "*.txt", "*.onnx", "*.onnx_data", "*.onnx.data")


def load(
    model: str | Path,
    *,
    vae: str | Path | None = None,
    preview_vae: str | Path | None = None,
    device: str = "auto",
    compute: str = "auto",
    threads: int | None = None,
    cache: bool = True,
    memory: str | int = AUTO,
    keep_loaded: bool = False,
    refiner: str | Path | None = None,
    loras: Sequence[AnyLora] = (),
    lora_folder: str | Path | None = None,
    wildcard_folder: str | Path | None = None,
    styles: str | Path | None = None,
    embeddings: Sequence[Path | str | tuple[Path | str, str | None]] = (),
    controls: Sequence[str | Path] = (),
    ip_adapters: Sequence[str | Path] = (),
    upscaler: str | Path | None = None,
    safety: str = "off",
) -> Pipeline:
    """Open a package as a `Pipeline`; its components are loaded when they are first used.

    Args:
        model: the directory of a package or of an optimum export, the name of a bundled model, or a Hub id.
        vae: a package whose VAE is used instead; a VAE-only package works too.
        preview_vae: a package whose VAE, such as TAESD, decodes `Progress.preview` in full size.
        device: auto (the first that can run the package), cuda, directml, webgpu, openvino or cpu, see docs/devices.md.
        compute: what the device computes in: f32, of which images equal diffusers'; bf16 or f16, where it has
            instructions for them; auto is the device's own choice.
        threads: CPU threads; None is the number of physical cores.
        cache: keep the graphs that openvino compiles on disk, from where they open in a fraction of the time.
        memory: memory limit of the process, in bytes or such as "600MB" or "2GiB"; "auto" is the free memory, "max"
            keeps every component loaded between images, "min" uses as little as possible.
        keep_loaded: keep components loaded between images where ``memory`` allows it: for many images, one by one.
        refiner: a package whose U-Net takes the last steps, such as SDXL's refiner.
        loras: LoRA files, each with a scale unless it is 1; see `Pipeline.set_loras`.
        lora_folder: the folder for ``<lora:name:0.8>`` in prompts.
        wildcard_folder: the folder for ``__name__`` in prompts: text files with one choice on each line.
        styles: AUTOMATIC1111's ``styles.csv``; requests name its styles.
        embeddings: textual inversion files, each with a trigger word unless the file names one; see
            `Pipeline.set_embeddings`.
        controls: ControlNet and T2I-Adapter packages; a request has a `Control` for each.
        ip_adapters: IP-Adapter packages; a request has an `IPAdapter` for each.
        upscaler: an upscaler package, which enlarges images between the passes of hires fix.
        safety: off; or what is done with images that a safety checker flags: mark, blur or refuse, see `Pipeline`.

    Raises:
        PackageError: a package does not exist, is damaged, or does not fit the model.
        RequestError: ``compute``, ``threads``, ``memory``, ``styles``, ``safety`` or a folder is invalid, there is no
            safety checker, or a LoRA or textual inversion file is damaged or made for another model.
        DeviceError: a package is made for another device, or the device does not compute so.
    """
    package = Package.open(find_model(model))
    pipeline = Pipeline(
        package if vae is None else package.with_vae(Package.open(find_model(vae))),
        preview_vae=None if preview_vae is None else Package.open(find_model(preview_vae)),
        device=device,
        compute=compute,
        threads=threads,
        cache=cache,
        memory=memory,
        keep_loaded=keep_loaded,
        refiner=None if refiner is None else Package.open(find_model(refiner)),
        lora_folder=None if lora_folder is None else Path(lora_folder),
        wildcard_folder=None if wildcard_folder is None else Path(wildcard_folder),
        styles=None if styles is None else Path(styles),
        controls=[Package.open(find_model(control)) for control in controls],
        ip_adapters=[Package.open(find_model(adapter)) for adapter in ip_adapters],
        upscaler=None if upscaler is None else Package.open(find_model(upscaler)),
        safety=safety,
    )
    pipeline.set_loras(loras)
    pipeline.set_embeddings(embeddings)
    return pipeline


def load_upscaler(
    model: str | Path,
    *,
    device: str = "auto",
    compute: str = "auto",
    threads: int | None = None,
    cache: bool = True,
    memory: str | int = AUTO,
) -> Upscaler:
    """Open an upscaler's package as an `Upscaler`; the model is loaded for each image.

    Args:
        model: the directory of a package, or its Hub id.
        device: auto (the first that can run the package), cuda, directml, webgpu, openvino or cpu, see docs/devices.md.
        compute: what the device computes in: f32, of which images equal diffusers'; bf16 or f16, where it has
            instructions for them; auto is the device's own choice.
        threads: CPU threads; None is the number of physical cores.
        cache: keep the graphs that openvino compiles on disk, from where they open in a fraction of the time.
        memory: memory limit of the process, as of `load`; tiles are as large as it allows.

    Raises:
        PackageError: the package does not exist, is damaged, or is of another kind.
        RequestError: ``compute``, ``threads`` or ``memory`` is invalid.
    """
    return Upscaler(
        Package.open(find_model(model)), device=device, compute=compute, threads=threads, cache=cache, memory=memory
    )


def find_model(model: str | Path) -> Path:
    """Return the directory of a package; a package on the Hub is downloaded to the Hub's cache.

    Raises:
        PackageError: there is no such package.
    """
    path = Path(model)
    if not _exists(path):
        remove_stale(path.parent)  # finishes the replacement of a package
    if _exists(path):
        return path
    name = str(model)
    if name in bundled():
        return bundled()[name]
    if name in recipes():
        raise PackageError(f"'{name}' is not exported yet; run: sdonnx export {name}, then use -m {name}-onnx")
    from sdonnx_export.hub import download, is_hub_id

    if isinstance(model, str) and is_hub_id(name):
        return download(name, _HUB_FILES, error=PackageError)
    raise PackageError(f"there is no model '{name}': no such directory, bundled model or Hub id; check its spelling")


def _exists(path: Path) -> bool:
    """Whether there is such a file; False for what can't be a path, such as a name of 300 characters."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def find_source(source: str) -> tuple[str, Recipe | None]:
    """Resolve the source of an export to a path or a Hub id, and its recipe if ``source`` names one."""
    if _exists(Path(source)):
        return source, None
    if source in recipes():
        recipe = recipes()[source]
        return recipe.source, recipe
    return str(bundled().get(source, source)), None
