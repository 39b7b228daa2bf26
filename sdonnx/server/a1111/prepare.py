"""A request of ``txt2img`` or ``img2img`` becomes a generation."""

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from PIL import Image, ImageOps
from sdonnx_runtime.images.preprocess import MAX_SIDE, UPSCALERS
from sdonnx_runtime.packages.concat import CONCAT
from sdonnx_runtime.packages.manifest import Manifest
from sdonnx_runtime.packages.package import Package

import sdonnx
from sdonnx.server.a1111.controlnet import Controls, Target, read_units
from sdonnx.server.a1111.distilled import cap_distilled
from sdonnx.server.a1111.errors import Unprocessable, with_their_name
from sdonnx.server.a1111.fields import Generate, ImageToImage, TextToImage
from sdonnx.server.a1111.options import Options
from sdonnx.server.a1111.samplers import read_sampling
from sdonnx.server.errors import NotFound
from sdonnx.server.generation import Generation
from sdonnx.server.images import decode_image
from sdonnx.server.infotext import infotext_fields, parse_infotext, second_pass_steps
from sdonnx.server.library import Library, Selection, ServedPackage

_FITS = {0: "stretch", 1: "crop", 2: "pad", 3: "stretch"}
"""How ``resize_mode`` resizes."""

_SAME = ("", "use same sampler", "use same scheduler", "use same checkpoint")

_UPSCALERS = {"latent": "latent", "lanczos": "lanczos", "none": "lanczos"}
"""Upscalers of hires fix; AUTOMATIC1111's ``None`` resizes the pixels with Lanczos' filter."""

_ALIKE = 1.02
"""The most by which the two passes' aspect ratios may differ, for rounding."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that is ready to be queued."""

    generation: Generation
    options: Options
    """The settings of this request."""
    package: ServedPackage
    notes: tuple[str, ...] = ()
    """What was lowered, for a distilled model."""
    comments: tuple[str, ...] = field(default=(), repr=False)
    """What was ignored."""


def prepare(library: Library, options: Options, form: Generate) -> Prepared:
    """Make the generation of a request; it decodes images, so it takes a while.

    Raises:
        NotFound: there is no such model, sampler or schedule.
        RequestError: a value is not supported, or an image is not one.
    """
    settings = library.settings
    options, ignored = options.changed(form.override_settings, library)
    comments = [f"settings that this server does not have: {', '.join(ignored)[:500]}"] if ignored else []
    replayed = {} if form.infotext is None else parse_infotext(form.infotext)
    options = _replay_model(options, replayed, form, library)
    served = options.package(library)
    manifest = served.package.manifest
    fields = _fields(form, options, manifest, settings.max_pixels, comments)
    controls = _scripts(form, library, _target(fields, served.package, settings.max_pixels))
    fields |= {"controls": controls.controls, "control_guess": controls.guess, "ip_adapters": controls.ip_adapters}
    refiner, fields["refiner_start"] = _refiner(form, library)
    comments += ["restore_faces is not supported"] if form.restore_faces else []
    notes: list[str] = []
    if not settings.as_asked:
        fields, lowered = cap_distilled(manifest, fields)
        notes = [with_their_name(each) for each in lowered]
    upscaler = _upscaler(fields.get("hires_upscaler"), library)
    if upscaler is not None:
        fields["hires_upscaler"] = upscaler.package.name
    generation = Generation(
        request=sdonnx.Request(**fields),
        selection=Selection(
            model=served.name,
            vae=options.vae,
            refiner=refiner,
            controls=controls.names,
            ip_adapters=controls.adapter_names,
            upscaler=None if upscaler is None else upscaler.name,
        ),
        preview_every=options.preview_every,
    )
    return Prepared(
        generation=generation, options=options, package=served, notes=tuple(notes), comments=(*notes, *comments)
    )


def _fields(
    form: Generate, options: Options, manifest: Manifest, max_pixels: int, comments: list[str]
) -> dict[str, Any]:
    """The fields of the request: those of an infotext, and over them what is given."""
    fields = {} if form.infotext is None else infotext_fields(form.infotext, family=manifest.family)
    fields |= _common(form, options) | read_sampling(form, fields, manifest)
    if isinstance(form, TextToImage):
        return _without(fields, _OF_IMAGES) | _hires(form, fields, manifest)
    if isinstance(form, ImageToImage):
        found = _image(form, manifest, max_pixels, comments)
        kept = {ours for ours, theirs in _OF_IMAGES.items() if ours in fields and theirs not in form.given}
        absent = _OF_HIRES if "mask_image" in found else (*_OF_HIRES, *_OF_MASKS)
        return _tile_whole(_without(fields, absent) | _without(found, kept), comments)
    return fields


def _tile_whole(fields: dict[str, Any], comments: list[str]) -> dict[str, Any]:
    """Leave tiling out where a crop is inpainted, which is their default for masks."""
    if fields.get("tiling") is None or fields.get("padding_mask_crop") is None:
        return fields
    comments.append("tiling is not supported with inpaint_full_res")
    return _without(fields, ("tiling",))


_OF_IMAGES = {
    "strength": "denoising_strength", "mask_blur": "mask_blur", "padding_mask_crop": "inpaint_full_res",
    "image_guidance_scale": "image_cfg_scale",
}  # fmt: skip
"""Fields that an image requires, and their names here; where they are left out, an infotext's apply."""

_OF_MASKS = ("mask_blur", "padding_mask_crop")

_OF_HIRES = ("hires_scale", "hires_strength", "hires_steps", "hires_upscaler")

_RENAMED = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale", "width": "width", "height": "height",
}  # fmt: skip
"""Fields of a request that only have another name here."""


def _without(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: each for name, each in fields.items() if name not in names}


def _replay_model(options: Options, replayed: Mapping[str, str], form: Generate, library: Library) -> Options:
    """Choose the model that an infotext names, if it is served and the request does not choose one."""
    name = replayed.get("Model")
    if name is None or "sd_model_checkpoint" in form.override_settings:
        return options
    served = next((each for each in library.models if name in (each.name, each.package.name)), None)
    return options if served is None else options.changed({"sd_model_checkpoint": served.name}, library)[0]


def _common(form: Generate, options: Options) -> dict[str, Any]:
    """The prompts, sizes and seeds that are given."""
    _refuse(form)
    fields = {ours: getattr(form, theirs) for theirs, ours in _RENAMED.items() if theirs in form.given}
    if "prompt" in form.given or form.infotext is None:
        fields["prompt"] = form.prompt + _lora_tags(form)
    fields["styles"] = tuple(form.styles)
    if "seed" in form.given:
        fields["seed"] = None if form.seed < 0 else form.seed
    if "subseed_strength" in form.given:
        seed = secrets.randbits(32) if form.subseed < 0 else form.subseed
        fields["variation"] = (seed, form.subseed_strength) if form.subseed_strength > 0 else None
    if "tiling" in form.given or options.tiling:
        tiles = form.tiling if "tiling" in form.given else True
        fields["tiling"] = "xy" if tiles else None
    skip = form.clip_skip or options.clip_skip
    if skip > 1:  # 1 is AUTOMATIC1111's name of the model's own
        fields["clip_skip"] = skip
    for name in ("batch_size", "n_iter"):
        if getattr(form, name) < 1:
            raise Unprocessable(f"{name} is {getattr(form, name)}; give 1 or more", fields={name: "give 1 or more"})
    return fields | {"num_images": form.batch_size * form.n_iter}


def _refuse(form: Generate) -> None:
    """Refuse what would change the image and is not supported."""
    if form.script_name:
        raise Unprocessable(f"Script '{form.script_name[:100]}' not found")
    if not all(isinstance(name, str) for name in form.styles):
        raise Unprocessable("styles is not a list of names", fields={"styles": "give a list of names"})
    if form.seed_resize_from_h > 0 or form.seed_resize_from_w > 0:
        raise sdonnx.RequestError("seed_resize_from_h and seed_resize_from_w are not supported; leave them out")


def _lora_tags(form: Generate) -> str:
    """stable-diffusion.cpp's list of LoRAs as tags of the prompt."""
    tags = ""
    for each in form.lora:
        path = cast("dict[str, Any]", each).get("path") if isinstance(each, dict) else each
        weight = cast("dict[str, Any]", each).get("multiplier", 1) if isinstance(each, dict) else 1
        if not isinstance(path, str) or not isinstance(weight, (int, float)) or set(path) & set("<>:"):
            raise Unprocessable("lora is not a list of objects with a path and a multiplier")
        tags += f"<lora:{path.removesuffix('.safetensors')}:{weight:g}>"
    return tags


def _hires(form: TextToImage, replayed: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """The fields of hires fix; none where only an infotext has it."""
    if "enable_hr" not in form.given:
        return {}
    if not form.enable_hr:
        return dict.fromkeys(_OF_HIRES)
    _refuse_hires(form)
    upscaler = form.hr_upscaler or "latent"
    upscaler = _UPSCALERS.get(upscaler.lower(), upscaler)
    size, scale = _hires_size(form, replayed, manifest)
    count = form.hr_second_pass_steps or replayed.get("num_inference_steps") or manifest.defaults.num_inference_steps
    steps, strength = second_pass_steps(min(count, 1000), form.denoising_strength)
    return dict(zip(_OF_HIRES, (scale, strength, steps, upscaler), strict=True)) | size


def _refuse_hires(form: TextToImage) -> None:
    """Refuse what would change the second pass alone."""
    names = {
        "hr_sampler_name": form.sampler_name,
        "hr_scheduler": form.scheduler,
        "hr_checkpoint_name": None,
        "hr_prompt": form.prompt,
        "hr_negative_prompt": form.negative_prompt,
        "hr_cfg": form.cfg_scale,
    }
    for name, own in names.items():
        value = getattr(form, name)
        if value not in (None, own) and str(value).lower() not in _SAME:
            raise sdonnx.RequestError(f"{name} is not supported; leave it out: both passes have the same")
    for name in ("hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "firstphase_width", "firstphase_height"):
        if not 0 <= getattr(form, name) <= MAX_SIDE:
            raise sdonnx.RequestError(f"{name} is {getattr(form, name)}; give 0 to {MAX_SIDE}")


def _hires_size(form: TextToImage, replayed: Mapping[str, Any], manifest: Manifest) -> tuple[dict[str, int], float]:
    """The size of the first pass, where it isn't the request's, and the factor of the second."""
    sides = [replayed.get(name) or own for name, own in zip(("width", "height"), manifest.defaults.sides, strict=True)]
    target, first = (form.hr_resize_x, form.hr_resize_y), {}
    if form.firstphase_width and form.firstphase_height:
        target, sides = (sides[0], sides[1]), [form.firstphase_width, form.firstphase_height]
        first = {"width": sides[0], "height": sides[1]}
    scales = [wanted / side for wanted, side in zip(target, sides, strict=True) if wanted and 0 < side <= MAX_SIDE]
    if scales and max(scales) > _ALIKE * min(scales):
        raise sdonnx.RequestError(
            f"{target[0]}x{target[1]} has another aspect ratio than the first pass; give the same"
        )
    return first, scales[0] if scales else form.hr_scale


def _image(form: ImageToImage, manifest: Manifest, max_pixels: int, comments: list[str]) -> dict[str, Any]:
    """The image, and what becomes of it."""
    if not form.init_images:
        raise NotFound("Init image not found")
    if len(form.init_images) > 1 or not isinstance(form.init_images[0], str):
        raise sdonnx.RequestError("init_images has more than one image, or none in base64; give one image a request")
    if form.resize_mode not in _FITS:
        raise sdonnx.RequestError(f"resize_mode is {form.resize_mode}; choose 0, 1, 2 or 3")
    if form.initial_noise_multiplier not in (None, 1):
        raise sdonnx.RequestError("initial_noise_multiplier is not supported; leave it out")
    image = decode_image(form.init_images[0], "init_images", max_pixels=max_pixels)
    fields: dict[str, Any] = {"image": image, "fit": _FITS[form.resize_mode], "strength": form.denoising_strength}
    if (form.width is None) != (form.height is None):
        own = manifest.defaults.sides
        fields |= {"width": own[0] if form.width is None else form.width}
        fields |= {"height": own[1] if form.height is None else form.height}
    concat = None if manifest.conditions.concat is None else CONCAT[manifest.conditions.concat]
    if concat is not None and concat.edits:
        fields |= {"strength": None, "image_guidance_scale": form.image_cfg_scale}
        comments.append("denoising_strength has no effect on a model that edits images")
    return fields | _mask(form, max_pixels, comments)


def _mask(form: ImageToImage, max_pixels: int, comments: list[str]) -> dict[str, Any]:
    """The mask, and where it applies."""
    if not form.mask:
        return {}
    if form.inpainting_fill not in (0, 1):
        raise sdonnx.RequestError(f"inpainting_fill is {form.inpainting_fill}; give 1: it starts from the image itself")
    if form.inpainting_fill == 0:
        comments.append("inpainting_fill 0 is not supported: it started from the image itself")
    mask = _mask_layer(decode_image(form.mask, "mask", max_pixels=max_pixels))
    return {
        "mask_image": ImageOps.invert(mask) if form.inpainting_mask_invert else mask,
        "mask_blur": form.mask_blur,
        "padding_mask_crop": form.inpaint_full_res_padding if form.inpaint_full_res else None,
    }


def _mask_layer(mask: Image.Image) -> Image.Image:
    """Convert a mask to L: the alpha of one that has transparent parts, otherwise its gray."""
    if mask.mode == "RGBA":
        alpha = mask.getchannel("A")
        if alpha.getextrema() != (255, 255):
            return alpha.point([0] * 129 + [255] * 127)
    return mask.convert("L")


def _scripts(form: Generate, library: Library, target: Target) -> Controls:
    """The always-on scripts; those that are switched off may be any."""
    args: list[Any] = []
    for name, script in form.alwayson_scripts.items():
        found = cast("dict[str, Any]", script).get("args") if isinstance(script, dict) else script
        given: list[Any] = list(cast("list[Any]", found)) if isinstance(found, list) else []
        if name.lower() == "controlnet":
            args += given
        elif given and given[0] not in (None, False):
            raise Unprocessable(f"always on script {name[:100]} not found")
    return read_units(args, library, target)


def _target(fields: Mapping[str, Any], package: Package, max_pixels: int) -> Target:
    image, own = fields.get("image"), package.manifest.defaults.sides
    sides = [fields.get(name) or side for name, side in zip(("width", "height"), own, strict=True)]
    is_unknown = image is not None and fields.get("width") is None
    is_refused = sides[0] * sides[1] > max_pixels  # later, as any size
    return Target(
        size=None if is_unknown or is_refused else (sides[0], sides[1]),
        fit=fields.get("fit", "crop"),
        image=image,
        is_crop=fields.get("padding_mask_crop") is not None,
        max_pixels=max_pixels,
    )


def _upscaler(name: str | None, library: Library) -> ServedPackage | None:
    """The upscaler package of hires fix; None where there is no such pass, or it takes none."""
    if name is None or name in UPSCALERS:
        return None
    try:
        return library.find_upscaler(name)
    except NotFound:
        served = "".join(f"{each.name}, " for each in library.upscalers)
        raise sdonnx.RequestError(f"hr_upscaler is {name!r:.80}; choose {served}Latent, Lanczos or None") from None


def _refiner(form: Generate, library: Library) -> tuple[str | None, float | None]:
    """The served name of a refiner, and where it takes over."""
    name, start = form.refiner_checkpoint or "", form.refiner_switch_at
    if name.lower() in ("", "none") or start in (None, 0, 1):
        return None, None
    return library.find(name).name, start
