"""Read a diffusers directory: a pipeline, a U-Net, a VAE, a ControlNet or a T2I-Adapter."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.files.json_file import load_json, whole_numbers
from sdonnx_runtime.files.kinds import describe_file
from sdonnx_runtime.packages.families import FAMILIES
from sdonnx_runtime.packages.optimum_layout import PIPELINES, as_loaded

from sdonnx_export.checkpoint_model import Checkpoint, Part, Weight
from sdonnx_export.checkpoints.companions import ALONE, MISSING, Companions, missing_vae
from sdonnx_export.checkpoints.few_steps import few_steps
from sdonnx_export.checkpoints.files import canonical_key, is_used_key, open_file
from sdonnx_export.checkpoints.ldm.checkpoint import unet_checkpoint
from sdonnx_export.checkpoints.text_encoders import assign
from sdonnx_export.models.components import VAES

PARTS = {
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model",) * 2,
    "vae": ("diffusion_pytorch_model",) * 2,
}
"""Each part's directory, and the stems of its safetensors and pickled files."""

_ALONE = {"UNet2DConditionModel": "unet", "ControlNetModel": "controlnet", "T2IAdapter": "adapter"}
"""diffusers' class of a component that may have a directory of its own, and the name of its part."""

_DOWNLOAD_AGAIN = "download the checkpoint again"


def read_directory(root: Path, name: str, revision: str | None, companions: Companions = ALONE) -> Checkpoint:
    """Open a pipeline, or a U-Net, a ControlNet or a T2I-Adapter alone; missing components are `MISSING`.

    Raises:
        ExportError: it is damaged, or can't be exported.
    """
    class_name = _class_name(root)
    if class_name in VAES:
        raise vae_alone_error(name)
    alone = {part: read_part(directory, part) for part, directory in alone_in(root).items()}
    if "unet" in alone:
        return replace(unet_checkpoint(name, alone["unet"], companions), revision=revision)
    if alone:
        return single_part_checkpoint(name, revision, alone)
    if class_name is not None and not (root / "model_index.json").is_file():
        raise ExportError(f"{name} holds a {class_name}; supported: {', '.join((*_ALONE, *VAES))}, and whole pipelines")
    return _read_pipeline(root, name, revision, companions)


def _read_pipeline(root: Path, name: str, revision: str | None, companions: Companions) -> Checkpoint:
    index, base = read_model_index(root, name), companions.base
    unet = _read_part_if_present(root, "unet")
    given = assign(companions.text_encoders, unet.weights)
    texts = [part for part in PARTS if part not in ("unet", "vae") and _is_component(index.get(part))]
    if not texts and base is not None:
        texts = [part for part in base.parts if part.startswith("text_encoder")]
    texts = texts or [*given] or ["text_encoder"]
    parts = {part: MISSING if part in given else _read_part_if_present(root, part) for part in PARTS if part in texts}
    parts |= {"unet": unet, "vae": _read_own_vae(root, index, companions)}
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in texts if parts[part].weights]
    for tokenizer in tokenizers:
        if base is None and not (root / tokenizer).is_dir():
            raise ExportError(f"{root / tokenizer} is missing; {_DOWNLOAD_AGAIN}")
    config = root / "scheduler" / "scheduler_config.json"
    lent = None if base is None or config.is_file() else base.scheduler
    return Checkpoint(
        source=name,
        revision=revision,
        parts={part: parts[part] for part in PARTS if part in parts},
        scheduler=as_loaded(_read_json(config), index) if lent is None else lent,
        tokenizers={each: root / each for each in tokenizers if (root / each).is_dir()},
        settings={key: value for key, value in index.items() if not isinstance(value, list)},
        defaults=few_steps(name),
    )


def _read_part_if_present(root: Path, part: str) -> Part:
    return read_part(root / part, part) if (root / part).is_dir() else MISSING


def _read_own_vae(root: Path, index: Mapping[str, Any], companions: Companions) -> Part:
    """Read a pipeline's VAE; only its config if it is replaced, that of its family if it is missing."""
    if companions.vae is None and (root / "vae").is_dir():
        return read_part(root / "vae", "vae")
    config = root / "vae" / "config.json"
    if config.is_file():
        return replace(MISSING, config=_read_json(config))
    family = FAMILIES["sdxl" if str(index["_class_name"]).startswith("StableDiffusionXL") else "sd1"]
    return missing_vae(family.scaling_factor)


def single_part_checkpoint(name: str, revision: str | None, parts: Mapping[str, Part]) -> Checkpoint:
    """Return the checkpoint of what generates no images by itself: a VAE, a control, an IP-Adapter."""
    return Checkpoint(source=name, revision=revision, parts=parts, scheduler={}, tokenizers={}, settings={})


def vae_alone_error(name: str) -> ExportError:
    """Return the error for a VAE where a checkpoint is expected."""
    return ExportError(
        f"{name} is a VAE alone; give it with --vae, together with a checkpoint or for a package of its own"
    )


def read_model_index(
    root: Path, name: str, *, expected: str = "a diffusers directory, a Hub id or a single file"
) -> dict[str, Any]:
    """Read model_index.json.

    Raises:
        ExportError: it is missing or damaged, or names a pipeline that can't be exported.
    """
    index = _read_json(root / "model_index.json", f"expected {expected}")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ExportError(f"{name} holds a {pipeline}; supported: {', '.join(PIPELINES)}")
    return index


def alone_in(root: Path) -> dict[str, Path]:
    """Return the directory of a U-Net, ControlNet or T2I-Adapter by the part's name; empty if it isn't one of these."""
    name = _class_name(root)
    return {_ALONE[name]: root} if name in _ALONE else {}


def part_directories(root: Path) -> dict[str, Path]:
    """Return the directories of a pipeline's parts."""
    return {part: root / part for part in PARTS if (root / part).is_dir()}


def _class_name(root: Path) -> Any:
    """Return the class that config.json names; None if there is no such file."""
    config = root / "config.json"
    return _read_json(config).get("_class_name") if config.is_file() else None


def _is_component(entry: Any) -> bool:
    """Whether an entry of model_index.json is a component's library and class; [null, null] is none."""
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def read_part(directory: Path, part: str) -> Part:
    """Open a part's config and weights.

    Raises:
        ExportError: a file is missing or damaged.
    """
    config = canonical_config(_read_json(directory / "config.json"))
    weights: dict[str, Weight] = {}
    for path in weight_files(directory, part):
        weights.update(open_file(path))
    return Part(
        config=config,
        weights={canonical_key(name): weight for name, weight in weights.items() if is_used_key(name, part)},
    )


def canonical_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in the form that diffusers writes today, as the package will have it."""
    nested = config.get("text_config")  # of a whole CLIP model
    canonical: dict[str, Any] = whole_numbers(nested if isinstance(nested, dict) else config)
    widths = canonical.get("cross_attention_dim")
    if isinstance(widths, list) and widths and all(width == widths[0] for width in widths):
        canonical["cross_attention_dim"] = widths[0]
    return canonical


def weight_files(directory: Path, part: str) -> list[Path]:
    """Return the files with a part's weights, of which diffusers reads the first: what has no suffix before variants.

    Safetensors go before pickles; diffusers' shards go before one file, transformers' after it. Of variants, fp16 is
    the first.

    Raises:
        ExportError: there are none, or an index names one that is missing.
    """
    safe, pickled = PARTS.get(part, PARTS["unet"])
    stems = (f"{safe}{{}}.safetensors", f"{pickled}{{}}.bin")
    order = 1 if part.startswith("text_encoder") else -1
    patterns = [
        pattern
        for variant in ("", ".fp16", ".*")
        for stem in stems
        for pattern in (stem.format(variant), f"{stem.format('')}.index{variant}.json")[::order]
    ]
    matches = (path for pattern in patterns for path in sorted(directory.glob(pattern)))
    for path in matches:
        if "-of-" not in path.name and path.is_file():
            return _shards(path) if path.suffix == ".json" else [path]
    raise ExportError(f"{directory} has no weights ({safe}.safetensors or a variant of it); download them again")


def _shards(index: Path) -> list[Path]:
    mapping = _read_json(index).get("weight_map")
    if not isinstance(mapping, dict):
        raise ExportError(f"{index} has no 'weight_map'; {_DOWNLOAD_AGAIN}")
    paths = []
    for name in sorted({str(value) for value in mapping.values()}):
        if Path(name).name != name or "\\" in name:
            raise ExportError(f"{index} names '{name}', which lies outside its directory; don't trust this checkpoint")
        if not (index.parent / name).is_file():
            raise ExportError(f"{index.parent / name} is missing, but {index.name} names it; download it again")
        paths.append(index.parent / name)
    return paths


def _read_json(path: Path, remedy: str = _DOWNLOAD_AGAIN) -> dict[str, Any]:
    try:
        data = load_json(path)
    except FileNotFoundError:
        raise ExportError(f"{path} is missing; {remedy}") from None
    except (OSError, ValueError):
        what = describe_file(path, is_text=True) or f"is not readable JSON; {remedy}"
        raise ExportError(f"{path} {what}") from None
    if not isinstance(data, dict):
        raise ExportError(f"{path} is not a JSON object; {remedy}")
    return data
