"""The packages that are served, and the pipelines that are open: one that generates, one that only plans."""

import copy
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdonnx_runtime.denoising.step_cache import unet_graphs
from sdonnx_runtime.memory.budget import Budget
from sdonnx_runtime.outputs.metadata import UPSCALER_SUFFIXES
from sdonnx_runtime.packages.families import PackageKind
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.text.styles import Style, read_styles

import sdonnx
from sdonnx.server.errors import NotFound
from sdonnx.server.settings import Settings

logger = logging.getLogger(__name__)

_MAX_PLANNERS = 8
_LORA_SUFFIXES = (".safetensors",)
_EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin")


@dataclass(frozen=True, kw_only=True)
class ServedPackage:
    """A package by the name that clients know it by."""

    name: str
    """The name of its directory, with a number where two have the same."""
    package: Package

    @property
    def digest(self) -> str:
        """That of its package: it names the weights, as A1111's hashes do."""
        return self.package.digest

    @property
    def title(self) -> str:
        """A1111's form: the name and the first ten digits of the digest."""
        return f"{self.name} [{self.digest[:10]}]"

    @property
    def fast(self) -> Mapping[str, Any]:
        """What of `sdonnx.FAST` it has graphs for; packages that optimum exported have none."""
        graphs, found = self.package.manifest.components["unet"].graphs, dict[str, Any]()
        for name, value in sdonnx.FAST.items():
            request = sdonnx.Request(prompt="", **{**found, name: value})
            needed = unet_graphs(request.cache_interval, token_downsampling=request.token_downsampling)
            if {each.name for each in needed} <= graphs.keys():
                found[name] = value
        return found


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The packages of a generation, by their served names."""

    model: str
    vae: str | None = None
    refiner: str | None = None
    controls: tuple[str, ...] = ()
    ip_adapters: tuple[str, ...] = ()
    upscaler: str | None = None
    """Of hires fix."""


class Library:
    """The served packages, LoRAs and embeddings; names come from listings alone, never paths.

    Raises:
        PackageError: a package that the settings name can't be opened.
        RequestError: a setting of pipelines is invalid.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._found: object = None
        self._packages: dict[str, ServedPackage] = {}
        self._planners: dict[Selection, sdonnx.Pipeline] = {}
        self._version = 0
        self._current: tuple[tuple[Selection, int], sdonnx.Pipeline] | None = None
        self._upscaler: tuple[tuple[str, int], sdonnx.Upscaler] | None = None
        self._lock = threading.RLock()
        for path in settings.packages:
            Package.open(path)  # says what is wrong with one
        self.refresh()
        if not self.models:
            raise sdonnx.PackageError("no package with a U-Net is served; name one with -m, or a folder with --models")
        Budget(settings.memory)
        self._log_safety(self.planner(Selection(model=self.default.name)))

    def _log_safety(self, pipeline: sdonnx.Pipeline) -> None:
        if pipeline.safety is not None:
            logger.info("images are checked by %s; --safety %s", pipeline.safety.checker.name, pipeline.safety.mode)

    def refresh(self) -> None:
        """Read the folders again, embeddings too; packages that can't be opened are left out."""
        named = [each for path in self.settings.packages for each in _open_if_package(path)]
        known = {path.resolve() for path, _ in named}
        for folder in self.settings.model_folders:
            for path in _subdirectories(folder):
                if path.resolve() not in known:
                    known.add(path.resolve())
                    named += _open_if_package(path)
        packages: dict[str, ServedPackage] = {}
        for path, package in named:
            stem = name = path.resolve().name
            number = 1
            while name in packages:
                number += 1
                name = f"{stem}-{number}"
            packages[name] = ServedPackage(name=name, package=package)
        found = packages, [(path, path.stat().st_mtime_ns) for path in self.embeddings()]
        with self._lock:
            if found != self._found:  # otherwise what is open stays so
                self._found, self._packages, self._planners, self._version = found, packages, {}, self._version + 1

    @property
    def models(self) -> list[ServedPackage]:
        """The packages that generate images by themselves, the default one first."""
        return self._of_kind(PackageKind.MODEL)

    @property
    def vaes(self) -> list[ServedPackage]:
        """The packages of a VAE alone."""
        return self._of_kind(PackageKind.VAE)

    @property
    def controls(self) -> list[ServedPackage]:
        """ControlNets and T2I-Adapters."""
        return self._of_kind(PackageKind.CONTROLNET, PackageKind.T2I_ADAPTER)

    @property
    def ip_adapters(self) -> list[ServedPackage]:
        """IP-Adapters."""
        return self._of_kind(PackageKind.IP_ADAPTER)

    @property
    def upscalers(self) -> list[ServedPackage]:
        """The packages that enlarge images."""
        return self._of_kind(PackageKind.UPSCALER)

    @property
    def default(self) -> ServedPackage:
        """The model of requests that name none; raises NotFound if somebody deleted all."""
        if not (models := self.models):
            raise NotFound("no model is served any more; put one into the server's folder")
        return models[0]

    def find(self, name: str, among: Iterable[ServedPackage] | None = None) -> ServedPackage:
        """Find a package by its name or title, with or without a file's ending; models by default.

        Raises:
            NotFound: none is served by this name.
        """
        packages = list(self.models if among is None else among)
        wanted = name.partition(" [")[0].strip()
        for each in packages:
            if each.name in (wanted, wanted.rpartition(".")[0]):
                return each
        served = ", ".join(each.name for each in packages) or "none"
        raise NotFound(f"'{wanted[:200]}' is not served; there are: {served}")

    def find_upscaler(self, name: str) -> ServedPackage:
        """Find an upscaler, as `find` does, also by its checkpoint's name, as images' parameters have it."""
        files = name, *(f"{name}{suffix}" for suffix in UPSCALER_SUFFIXES)
        named = [each for each in self.upscalers if each.package.name in files]
        try:
            return self.find(name, self.upscalers)
        except NotFound:
            if not named:
                raise
            return named[0]

    def digests(self) -> dict[str, str]:
        """The digests of all packages, by their names."""
        return {name: each.digest for name, each in self._packages.items()}

    def loras(self) -> list[Path]:
        """The LoRA files of the folder."""
        return list(_files(self.settings.lora_folder, _LORA_SUFFIXES))

    def embeddings(self) -> list[Path]:
        """The textual inversion files of the folder."""
        return list(_files(self.settings.embedding_folder, _EMBEDDING_SUFFIXES))

    def styles(self) -> list[Style]:
        """The styles of the file; raises RequestError if it can't be read any more."""
        return [] if self.settings.styles is None else list(read_styles(self.settings.styles).values())

    def open(self, selection: Selection) -> sdonnx.Pipeline:
        """The pipeline that generates with these packages; the one before is closed. For the worker alone.

        Raises:
            SdonnxError: they can't be opened, or don't fit each other.
        """
        key = selection, self._version
        if self._current is None or self._current[0] != key:
            self.close()
            self._current = key, self._make(selection, self.settings.memory)
        return self._current[1]

    def upscaler(self, name: str) -> sdonnx.Upscaler:
        """The upscaler of a served package; the one before is closed. For the worker alone; raises as `open` does."""
        key = name, self._version
        if self._upscaler is None or self._upscaler[0] != key:
            if self._upscaler is not None:
                self._upscaler[1].close()
            self._upscaler = key, self.make_upscaler(name)
        return self._upscaler[1]

    def make_upscaler(self, name: str) -> sdonnx.Upscaler:
        """An upscaler of a served package, which loads nothing yet; raises as `open` does."""
        settings, package = self.settings, self.find_upscaler(name).package
        return sdonnx.Upscaler(
            package,
            device=settings.device,
            compute=settings.compute,
            threads=settings.threads,
            cache=settings.cache,
            memory=settings.memory,
        )

    @property
    def loaded(self) -> Selection | None:
        """The packages of the pipeline that generates."""
        current = self._current
        return None if current is None else current[0][0]

    @property
    def held_bytes(self) -> int:
        """The memory of the process that the pipeline's loaded components have, in bytes; while no job runs."""
        return 0 if self._current is None else self._current[1].held_bytes

    def close(self) -> None:
        """Close the pipeline that generates, and the upscaler."""
        if self._current is not None:
            current, self._current = self._current, None
            current[1].close()
        if self._upscaler is not None:
            upscaler, self._upscaler = self._upscaler, None
            upscaler[1].close()

    def planner(self, selection: Selection) -> sdonnx.Pipeline:
        """A pipeline that resolves and plans requests, in any thread, and loads nothing.

        Raises:
            SdonnxError: as `open` does.
        """
        with self._lock:
            if selection not in self._planners:
                for oldest in list(self._planners)[: 1 - _MAX_PLANNERS]:
                    del self._planners[oldest]
                self._planners[selection] = self._make(selection, "min")
            return self._planners[selection]

    def _make(self, selection: Selection, memory: str) -> sdonnx.Pipeline:
        settings, package = self.settings, self.find(selection.model).package
        if selection.vae is not None:
            package = package.with_vae(self.find(selection.vae, self.vaes).package)
        pipeline = sdonnx.Pipeline(
            package,
            device=settings.device,
            compute=settings.compute,
            threads=settings.threads,
            cache=settings.cache,
            memory=memory,
            keep_loaded=True,
            refiner=None if selection.refiner is None else self.find(selection.refiner).package,
            lora_folder=settings.lora_folder,
            wildcard_folder=settings.wildcard_folder,
            styles=settings.styles,
            controls=[self.find(name, self.controls).package for name in selection.controls],
            ip_adapters=[self.find(name, self.ip_adapters).package for name in selection.ip_adapters],
            upscaler=None if selection.upscaler is None else self.find_upscaler(selection.upscaler).package,
            safety=settings.safety,
        )
        pipeline.set_embeddings(self.fitting_embeddings(pipeline))
        return pipeline

    def fitting_embeddings(self, pipeline: sdonnx.Pipeline) -> list[Path]:
        """The embeddings that were made for the pipeline's text encoders."""
        fitting = list[Path]()
        for path in self.embeddings():
            try:
                pipeline.set_embeddings([path])
            except sdonnx.SdonnxError:
                continue
            fitting.append(path)
        return fitting

    def public(self, error: sdonnx.SdonnxError) -> sdonnx.SdonnxError:
        """The error as clients read it: files are named from the served folders on, not from this machine's root."""
        text = message = str(error)
        for folder in self._folders:
            text = text.replace(str(folder), folder.name)
        if text == message:
            return error
        public = copy.copy(error)
        public.args = (text,)
        return public

    @property
    def _folders(self) -> list[Path]:
        """The absolute paths of all folders that the settings name, inner ones first."""
        settings = self.settings
        named = (
            settings.lora_folder, settings.embedding_folder, settings.wildcard_folder, settings.styles, settings.output
        )  # fmt: skip
        found = [each for each in (*settings.packages, *settings.model_folders, *named) if each is not None]
        paths = {path for each in found for path in (each, each.absolute(), each.resolve())}
        return sorted((each for each in paths if each.is_absolute() and each.name), key=lambda each: -len(str(each)))

    def _of_kind(self, *kinds: PackageKind) -> list[ServedPackage]:
        return [each for each in self._packages.values() if each.package.kind in kinds]


def _subdirectories(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise sdonnx.PackageError(f"{folder} can't be read ({error.strerror}); give the folder of packages") from None


def _open_if_package(path: Path) -> list[tuple[Path, Package]]:
    try:
        return [(path, Package.open(path))]
    except sdonnx.SdonnxError:
        return []


def _files(folder: Path | None, suffixes: tuple[str, ...]) -> Iterator[Path]:
    if folder is None:
        return
    with suppress(OSError):  # somebody deleted it
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
                yield path
