"""The settings that clients read and change: ``/options``, and a request's ``override_settings``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sdonnx.server.a1111.errors import AsciiJson, Unprocessable
from sdonnx.server.a1111.fields import parse_body
from sdonnx.server.context import context_of
from sdonnx.server.library import Library, ServedPackage

FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
"""Formats of images by the names of ``samples_format``."""

_OWN_VAE = ("", "automatic", "none")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings that are not a request's own."""

    model: str | None = None
    """A served name; None is the server's default."""
    vae: str | None = None
    """A served name; None is the model's own."""
    samples_format: str = "png"
    """A key of FORMATS."""
    preview_every: int = 1
    """Steps between previews; 0 makes none."""
    clip_skip: int = 1
    return_grid: bool = True
    """Whether replies with ``save_images`` begin with a grid of several images."""
    tiling: bool = False
    """Whether images tile seamlessly, both to the right and downwards."""

    def package(self, library: Library) -> ServedPackage:
        """The model."""
        return library.default if self.model is None else library.find(self.model)

    def changed(self, settings: Mapping[str, Any], library: Library) -> "tuple[Options, list[str]]":
        """Change settings by AUTOMATIC1111's names; also returns the names that are unknown.

        Raises:
            NotFound: there is no such model or VAE.
            Unprocessable: a value has a wrong type.
        """
        options, ignored = self, list[str]()
        for name, value in settings.items():
            if name not in _SETTINGS:
                ignored.append(name)
            elif value is not None:
                options = replace(options, **_SETTINGS[name](value, library))
        return options, ignored


def current_options(request: Request) -> Options:
    """The settings as they are."""
    return getattr(request.app.state, "a1111_options", Options())


def set_options(request: Request, options: Options) -> None:
    """Change the settings for all requests to come."""
    request.app.state.a1111_options = options


async def get_options(request: Request) -> Response:
    """``GET /options``."""
    options = current_options(request)
    package = options.package(context_of(request).library)
    values = {
        "sd_model_checkpoint": package.title,
        "sd_checkpoint_hash": package.digest,
        "sd_vae": options.vae or "Automatic",
        "samples_format": options.samples_format,
        "show_progress_every_n_steps": options.preview_every,
        "live_previews_enable": options.preview_every > 0,
        "CLIP_stop_at_last_layers": options.clip_skip,
        "return_grid": options.return_grid,
        "tiling": options.tiling,
    }
    return AsciiJson(values)


async def post_options(request: Request) -> Response:
    """``POST /options``; the model changes with the next job."""
    settings = parse_body(await request.body())
    options, _ = current_options(request).changed(settings, context_of(request).library)
    set_options(request, options)
    return AsciiJson(None)


def _model(value: Any, library: Library) -> dict[str, Any]:
    name = _text("sd_model_checkpoint", value)
    return {"model": library.find(name).name} if name else {}


def _vae(value: Any, library: Library) -> dict[str, Any]:
    name = _text("sd_vae", value)
    return {"vae": None if name.lower() in _OWN_VAE else library.find(name, library.vaes).name}


def _format(value: Any, _: Library) -> dict[str, Any]:
    name = _text("samples_format", value).lower()
    if name not in FORMATS:
        raise Unprocessable(f"samples_format is {name[:50]!r}; choose {', '.join(FORMATS)}")
    return {"samples_format": name}


def _preview_every(value: Any, _: Library) -> dict[str, Any]:
    return {"preview_every": max(0, _whole("show_progress_every_n_steps", value))}


def _clip_skip(value: Any, _: Library) -> dict[str, Any]:
    return {"clip_skip": _whole("CLIP_stop_at_last_layers", value)}


def _return_grid(value: Any, _: Library) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise Unprocessable(f"return_grid is {value!r:.80}; give true or false")
    return {"return_grid": value}


def _tiling(value: Any, _: Library) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise Unprocessable(f"tiling is {value!r:.80}; give true or false")
    return {"tiling": value}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Unprocessable(f"{name} is {value!r:.80}; give a text")
    return value.strip()


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, (int, float)) or value != int(value):
        raise Unprocessable(f"{name} is {value!r:.80}; give a whole number")
    return int(value)


_SETTINGS: Mapping[str, Callable[[Any, Library], dict[str, Any]]] = {
    "sd_model_checkpoint": _model,
    "sd_vae": _vae,
    "samples_format": _format,
    "show_progress_every_n_steps": _preview_every,
    "CLIP_stop_at_last_layers": _clip_skip,
    "return_grid": _return_grid,
    "tiling": _tiling,
}
