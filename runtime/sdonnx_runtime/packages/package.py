"""The package on disk: opening one, ours or an optimum export, and checking that it is whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.packages.manifest import ALONE, CONTROLS, FAMILIES, MANIFEST, VAE_ALONE, Manifest, read_manifest
from sdonnx_runtime.packages.optimum_layout import infer_manifest

VAE = ("vae_decoder", "vae_encoder")
"""The components that `Package.with_vae` exchanges."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """An opened package."""

    root: Path
    manifest: Manifest
    foreign: bool = False
    """Whether the manifest was inferred from an optimum export."""
    elsewhere: Mapping[str, "Package"] = field(default_factory=dict[str, "Package"])
    """The packages that components are taken from instead, by component."""

    @property
    def name(self) -> str:
        """What the checkpoint was called that it was made of."""
        return self.manifest.source.name

    @property
    def vae(self) -> "Package | None":
        """The package whose VAE it has instead of its own."""
        return self.elsewhere.get("vae_decoder")

    @property
    def makes_pictures(self) -> bool:
        """Whether it does so by itself."""
        return self.manifest.family not in ALONE

    @property
    def is_vae_alone(self) -> bool:
        """Whether it makes no pictures of its own, but decodes and encodes those of other packages."""
        return self.manifest.family == VAE_ALONE

    @property
    def control(self) -> str | None:
        """The one of CONTROLS that it is; it makes no pictures of its own then, but steers other packages."""
        return self.manifest.family if self.manifest.family in CONTROLS else None

    @property
    def kind(self) -> str:
        """What it is, in a few words."""
        return FAMILIES[self.manifest.family]

    @property
    def precision(self) -> str:
        """The U-Net's."""
        return self.manifest.components["unet"].precision

    def graph(self, component: str, variant: str = "plain") -> Path:
        """The ``.onnx`` file of a component's variant.

        Raises:
            PackageError: the package has no such component or variant.
        """
        found = self.manifest.components.get(component)
        if found is None or variant not in found.graphs:
            raise PackageError(f"{self.root} has no {component} ({variant}); run 'sdonnx export' again")
        return self.elsewhere.get(component, self).root / found.graphs[variant]

    def with_vae(self, other: "Package") -> "Package":
        """This package with the VAE of another one, which may be a VAE alone: its graphs, its scaling and its shift.

        Raises:
            PackageError: it has other latents, or no VAE.
        """
        if "vae_decoder" not in other.manifest.components:
            raise PackageError(f"{other.root} is {other.kind}; give a package with a VAE, and this one with --control")
        mine, its = self.manifest.latents, other.manifest.latents
        if (mine.channels, mine.downscale) != (its.channels, its.downscale):
            raise PackageError(
                f"{other.root} has a VAE for latents of {its.channels} channels and {its.downscale} pixels a cell, but "
                f"those of {self.root} have {mine.channels} and {mine.downscale}; take a VAE that was made for it"
            )
        own = {name: part for name, part in self.manifest.components.items() if name not in VAE}
        new = {name: part for name, part in other.manifest.components.items() if name in VAE}
        latents = its if its.preview is not None else replace(its, preview=mine.preview)
        return replace(
            self,
            manifest=replace(self.manifest, components={**own, **new}, latents=latents),
            elsewhere={name: other.elsewhere.get(name, other) for name in new},
        )

    @classmethod
    def open(cls, root: Path) -> "Package":
        """Reads and checks a package's manifest; of an optimum export, infers it.

        Raises:
            PackageError: the directory is no package, or one of another format, incomplete, cut or hostile.
        """
        if not root.is_dir():
            raise PackageError(f"{root} is not a directory; give one that 'sdonnx export' wrote")
        if (root / MANIFEST).is_file():
            package = cls(root=root, manifest=read_manifest(root))
        elif (root / "model_index.json").is_file():
            package = cls(root=root, manifest=infer_manifest(root), foreign=True)
        else:
            raise PackageError(
                f"{root} has neither {MANIFEST} nor model_index.json; give a directory that 'sdonnx export' wrote"
            )
        _check_files(package)
        return package


def _check_files(package: Package) -> None:
    manifest = package.manifest
    encoders = (encoder.component for encoder in manifest.text_encoders)
    needed = {"unet", "vae_decoder", *encoders} if package.makes_pictures else {ALONE[manifest.family]}
    for name in sorted(needed):
        package.graph(name)
    for encoder in manifest.text_encoders:
        _inside(package.root, encoder.tokenizer)
    for component in manifest.components.values():
        for graph in component.graphs.values():
            if graph not in component.files:
                raise PackageError(f"{package.root / MANIFEST} lists no file '{graph}'; run 'sdonnx export' again")
        for relative, file in component.files.items():
            _check_size(_inside(package.root, relative), file.size)


def _inside(root: Path, relative: str) -> Path:
    """``root / relative``; links are followed (the Hub's cache is made of them), but ``..`` is not."""
    parts = PurePosixPath(relative).parts
    if not parts or ".." in parts or relative.startswith("/") or "\\" in relative or ":" in relative:
        raise PackageError(f"{root}: the path '{relative}' leaves the package; refuse it, or ask who made it")
    return root.joinpath(*parts)


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise PackageError(f"{path} is missing; run 'sdonnx export' again")
    found = path.stat().st_size
    if found != expected:
        raise PackageError(f"{path} has {found} bytes instead of {expected}; copy or export the package again")
