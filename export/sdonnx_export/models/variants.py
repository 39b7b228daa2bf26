"""The graphs of a checkpoint's components: every variant, for one target and precision."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import onnx_ir as ir
from sdonnx_runtime.packages.package import VAE
from sdonnx_runtime.packages.variant import EMBEDDED, PLAIN, TILED, UNET_VARIANTS

from sdonnx_export.checkpoint_model import Checkpoint
from sdonnx_export.models.components import COMPONENTS, build, components_in, has_norms, layer_shapes
from sdonnx_export.models.unet import cache_stage
from sdonnx_export.models.unet_config import UNetConfig
from sdonnx_export.operators.partition import make_cache_graphs, make_embedded_graph
from sdonnx_export.operators.precision import MixedPrecision, Precision, PrecisionSpec, make_precision_lookup
from sdonnx_export.operators.quantized import Range
from sdonnx_export.operators.targets import INT8_OPERATORS, find_operators


@dataclass(frozen=True, kw_only=True)
class VariantBuilder:
    """What the graphs of a package are built from."""

    checkpoint: Checkpoint
    precision: PrecisionSpec
    target: str = "generic"
    """One of TARGETS."""
    ranges: Mapping[str, Mapping[str, Range]] = field(default_factory=dict[str, Mapping[str, Range]])
    """Of what int8 layers read, by component; a layer that needs a range and has none computes in floating point."""

    def check(self) -> set[Precision]:
        """Return the precisions that layers have.

        Raises:
            ExportError: a mixed precision names layers that do not exist, or the target does not support a precision.
        """
        components = components_in(self.checkpoint).items()
        known = {name: layer_shapes(name, self.checkpoint.parts[each.part].config) for name, each in components}
        if isinstance(self.precision, MixedPrecision):
            self.precision.check(known)
        find = {name: make_precision_lookup(self.precision, name) for name in known}
        precisions: set[Precision] = {find[name](layer) for name, layers in known.items() for layer in layers}
        find_operators(self.target, precisions)
        return precisions

    def build(self, name: str) -> dict[str, ir.Model]:
        """Build the variants of a component, by name."""
        plain = self._build_model(name)
        if name.startswith("text_encoder"):
            return {PLAIN: plain, EMBEDDED: make_embedded_graph(plain)}
        if name in VAE and has_norms(self.checkpoint.parts["vae"].config):
            return {PLAIN: plain, TILED: self._build_model(name, tiled=True)}
        if name != "unet":
            return {PLAIN: plain}
        stage = cache_stage(UNetConfig.from_dict(self.checkpoint.parts["unet"].config))
        graphs: dict[str, ir.Model] = {}
        for whole in (variant for variant in UNET_VARIANTS if variant.cache is None):
            choices = {"token_downsampling": whole.token_downsampling, "controlled": whole.controlled}
            model = self._build_model(name, **choices) if any(choices.values()) else plain
            graphs[whole.name] = model
            cached = make_cache_graphs(model, stage).items()
            graphs |= {replace(whole, cache=step).name: graph for step, graph in cached}
        return graphs

    def _build_model(self, name: str, **choices: bool) -> ir.Model:
        """Build a component's model; layers are int8 where they have the ranges that they need."""
        part = self.checkpoint.parts[COMPONENTS[name].part]
        find = make_precision_lookup(self.precision, name)
        make = partial(build, name, part, self.precision, target=self.target, **choices)
        if not any(find(layer) == "int8" for layer in layer_shapes(name, part.config)):
            return make()
        return make(partial(INT8_OPERATORS[self.target], ranges=self.ranges.get(name, {})))
