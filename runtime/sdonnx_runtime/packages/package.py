"""The package on disk: opening one, ours or an optimum export, and checking that it is whole."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.files.kinds import describe_file
from sdonnx_runtime.packages.families import FAMILIES, REQUIRED_COMPONENTS, PackageKind
from sdonnx_runtime.packages.manifest import MANIFEST, Manifest, read_manifest
from sdonnx_runtime.packages.optimum_layout import infer_optimum_manifest
from sdonnx_runtime.packages.variant import PLAIN

VAE = ("vae_decoder", "vae_encoder")
"""The components that `Package.with_vae` exchanges."""


_SMALL = 10_000
"""Bytes below which a file of another size than the manifest's may be a pointer or a web page instead."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """An opened package."""

    root: Path
    manifest: Manifest
    is_optimum: bool = False
    """Whether the manifest was inferred from an optimum export."""
    component_packages: Mapping[str, "Package"] = field(default_factory=dict[str, "Package"])
    """The packages that replace components of this one, by component."""

    @property
    def name(self) -> str:
        """The name of the checkpoint that was exported."""
        return self.manifest.source.name

    @property
    def kind(self) -> PackageKind:
        """What it is used for."""
        return FAMILIES[self.manifest.family].kind

    @property
    def title(self) -> str:
        """Its family, in a few words."""
        return FAMILIES[self.manifest.family].title

    @property
    def digest(self) -> str:
        """The SHA-256 of its manifest's list of files, hexadecimal: one name for all weights."""
        parts = self.manifest.components.items()
        files = sorted(f"{path} {file.sha256} {file.size}" for _, part in parts for path, file in part.files.items())
        return hashlib.sha256("\n".join(files).encode()).hexdigest()

    @property
    def vae(self) -> "Package | None":
        """The package whose VAE replaces its own."""
        return self.component_packages.get("vae_decoder")

    @property
    def precision(self) -> str:
        """The U-Net's."""
        return self.manifest.components["unet"].precision

    def graph(self, component: str, variant: str = PLAIN) -> Path:
        """Find the ``.onnx`` file of a component's variant.

        Raises:
            PackageError: the package has no such component or variant.
        """
        found = self.manifest.components.get(component)
        if found is None or variant not in found.graphs:
            raise PackageError(f"{self.root} has no {component} ({variant}); run 'sdonnx export' again")
        return self.component_packages.get(component, self).root / found.graphs[variant]

    def target(self, component: str) -> str:
        """What the graphs of a component are made for: one of TARGETS."""
        return self.component_packages.get(component, self).manifest.target

    def compute(self, component: str) -> str:
        """What the graphs of a component are written to compute in: f32, or f16 for GPUs alone."""
        is_half = self.manifest.components[component].precision == "fp16"
        return "f16" if is_half and self.target(component) not in ("generic", "openvino") else "f32"

    def with_vae(self, other: "Package") -> "Package":
        """Replace the VAE by another package's: its graphs, scaling and shift.

        Raises:
            PackageError: the other has no VAE, or one for other latents.
        """
        if "vae_decoder" not in other.manifest.components:
            more = ", and this one with --control" if other.kind.is_control else ""
            raise PackageError(f"{other.root} is {other.title}; give a package with a VAE{more}")
        own, new = self.manifest.latents, other.manifest.latents
        if (own.channels, own.downscale) != (new.channels, new.downscale):
            raise PackageError(
                f"{other.root} has a VAE for latents of {new.channels} channels, {new.downscale} times smaller than "
                f"the image; {self.root} requires {own.channels} channels, {own.downscale} times smaller; "
                "choose a VAE that was made for it"
            )
        others = {name: part for name, part in self.manifest.components.items() if name not in VAE}
        vae = {name: part for name, part in other.manifest.components.items() if name in VAE}
        latents = new if new.preview is not None else replace(new, preview=own.preview)
        return replace(
            self,
            manifest=replace(self.manifest, components={**others, **vae}, latents=latents),
            component_packages={name: other.component_packages.get(name, other) for name in vae},
        )

    @classmethod
    def open(cls, root: Path) -> "Package":
        """Read and check a package's manifest; of an optimum export, infer it.

        Raises:
            PackageError: the directory is not a package, or one of another format, incomplete, cut or hostile.
        """
        if not root.is_dir():
            raise PackageError(f"{root} is not a directory; give one that 'sdonnx export' wrote")
        try:
            str(root).encode()
        except UnicodeEncodeError:
            raise PackageError(f"{root!r} is not valid Unicode, which ONNX Runtime requires; rename it") from None
        if (root / MANIFEST).is_file():
            package = cls(root=root, manifest=read_manifest(root))
        elif (root / "model_index.json").is_file():
            package = cls(root=root, manifest=infer_optimum_manifest(root), is_optimum=True)
        else:
            raise PackageError(
                f"{root} has neither {MANIFEST} nor model_index.json; give a directory that 'sdonnx export' wrote"
            )
        _check_files(package)
        return package


def _check_files(package: Package) -> None:
    manifest = package.manifest
    encoders = (encoder.component for encoder in manifest.text_encoders)
    for name in sorted({*REQUIRED_COMPONENTS[package.kind], *encoders}):
        package.graph(name)
    for encoder in manifest.text_encoders:
        _resolve_path(package.root, encoder.tokenizer)
    for component in manifest.components.values():
        for graph in component.graphs.values():
            if graph not in component.files:
                raise PackageError(f"{package.root / MANIFEST} lists no file '{graph}'; run 'sdonnx export' again")
        for relative, file in component.files.items():
            path = _resolve_path(package.root, relative)
            try:
                size = path.stat().st_size if path.is_file() else None
            except OSError as error:
                raise PackageError(f"{path} can't be read ({error.strerror}); run 'sdonnx export' again") from None
            if size is None:
                raise PackageError(f"{path} is missing; run 'sdonnx export' again")
            if size != file.size:
                what = describe_file(path) if size < _SMALL else None
                what = what or f"has {size} bytes instead of {file.size}; copy or export the package again"
                raise PackageError(f"{path} {what}")


def _resolve_path(root: Path, relative: str) -> Path:
    """``root / relative``; links are followed (the Hub's cache is made of them), but ``..`` is refused."""
    parts = PurePosixPath(relative).parts
    if not parts or ".." in parts or relative.startswith("/") or {*"\\:"} & {*relative} or not relative.isprintable():
        raise PackageError(f"{root}: path '{relative}' points outside the package; don't trust it")
    return root.joinpath(*parts)


_WITH = "give a whole package, and this one with"
_OTHER_USES = {
    PackageKind.VAE: f"{_WITH} --vae (or vae=)",
    PackageKind.CONTROLNET: f"{_WITH} --control (or controls=)",
    PackageKind.T2I_ADAPTER: f"{_WITH} --control (or controls=)",
    PackageKind.IP_ADAPTER: f"{_WITH} --ip-adapter (or ip_adapters=)",
    PackageKind.UPSCALER: "it enlarges images: sdonnx upscale IMAGE -m PACKAGE (or sdonnx.load_upscaler)",
}
"""What a package of another kind is for."""


def check_model(package: Package) -> None:
    """Check that a package generates images by itself; raises PackageError, which says what another is for."""
    if package.kind is not PackageKind.MODEL:
        raise PackageError(f"{package.root} is {package.title}; {_OTHER_USES[package.kind]}")
