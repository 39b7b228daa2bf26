"""The package on disk: opening one, ours or an optimum export, and checking that it is whole."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.manifest import MANIFEST, Manifest, read_manifest
from sdonnx_runtime.optimum_layout import infer_manifest


@dataclass(frozen=True, kw_only=True)
class Package:
    """An opened package."""

    root: Path
    manifest: Manifest
    foreign: bool = False
    """Whether the manifest was inferred from an optimum export."""

    @property
    def name(self) -> str:
        """What the checkpoint was called that it was made of."""
        return self.manifest.source.name

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
        return self.root / found.graphs[variant]

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
    needed = {"unet", "vae_decoder", *(encoder.component for encoder in manifest.text_encoders)}
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
