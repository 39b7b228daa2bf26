"""The adapters of a pipeline: those that are set, and those that a request's prompts name."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sdonnx_runtime.adapters.lora import AnyLora, Lora
from sdonnx_runtime.adapters.merging import Adapters, load_adapters
from sdonnx_runtime.adapters.textual_inversion import Embedding, TextualInversions, read_embedding
from sdonnx_runtime.packages.package import Package


class AdapterSet:
    """LoRAs and textual inversions of a package; the last combination with a prompt's LoRAs is kept."""

    def __init__(self, package: Package, refiner: Package | None = None) -> None:
        self._package, self._refiner = package, refiner
        self._loras, self._ignore_unmatched = Adapters(), False
        self._embeddings: tuple[Embedding, ...] = ()
        self._combined: tuple[tuple[Lora, ...], Adapters] = (), self._loras

    def set_loras(self, loras: Sequence[AnyLora], *, ignore_unmatched: bool) -> None:
        """Replace the LoRAs; raises as `load_adapters` does."""
        adapters = load_adapters(self._package, [Lora.of(each) for each in loras], ignore_unmatched=ignore_unmatched)
        self._check_embeddings((*self._embeddings, *adapters.embeddings))
        self._ignore_unmatched = ignore_unmatched
        self._set(adapters, self._embeddings)

    def set_embeddings(self, embeddings: Sequence[Path | str | tuple[Path | str, str | None]]) -> None:
        """Replace the textual inversions; raises as `read_embedding` and `TextualInversions` do."""
        pairs = (each if isinstance(each, tuple) else (each, None) for each in embeddings)
        read = tuple(read_embedding(Path(path), word) for path, word in pairs)
        self._check_embeddings((*read, *self._loras.embeddings))
        self._set(self._loras, read)

    def combine(self, named: tuple[Lora, ...]) -> Adapters:
        """Combine the adapters that are set with LoRAs that prompts name, which ``Adapters.loras`` leaves out.

        It raises as `load_adapters` does.
        """
        if named != self._combined[0]:
            loras = [*self._loras.loras, *named]
            both = load_adapters(self._package, loras, ignore_unmatched=self._ignore_unmatched)
            embeddings = (*self._embeddings, *both.embeddings)
            self._check_embeddings(embeddings)
            self._combined = named, replace(both, loras=self._loras.loras, embeddings=embeddings)
        return self._combined[1]

    def _check_embeddings(self, embeddings: Sequence[Embedding]) -> None:
        for package in (self._package, self._refiner):
            if package is not None:
                TextualInversions(package, embeddings)

    def _set(self, loras: Adapters, embeddings: tuple[Embedding, ...]) -> None:
        self._loras, self._embeddings = loras, embeddings
        self._combined = (), replace(loras, embeddings=(*embeddings, *loras.embeddings))
