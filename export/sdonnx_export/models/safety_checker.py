"""The StableDiffusionSafetyChecker of diffusers: CLIP's embedding of an image, compared with those of concepts."""

import onnx_ir as ir
from onnxscript.nn import Module, Parameter
from sdonnx_runtime.safety.checkers import CONCEPTS, SPECIAL_CARE

from sdonnx_export.models.clip_vision import ClipVisionConfig, ClipVisionTransformer
from sdonnx_export.models.layers import Linear
from sdonnx_export.operators.base import Operators
from sdonnx_export.operators.stored import FLOAT

_CONCEPTS, _SPECIAL_CARE = 17, 3
"""How many there are, in diffusers."""


class SafetyChecker(Module):
    """Normalized images (N, 3, size, size) to the scores of concepts of special care (N, 3), and of all others (N, 17).

    A score is how far the cosine similarity of image and concept is above the concept's threshold.
    """

    outputs = (SPECIAL_CARE, CONCEPTS)

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__("")
        self.vision_model = _VisionModel(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False)
        self.concept_embeds = Parameter([_CONCEPTS, config.projection_dim])
        self.concept_embeds_weights = Parameter([_CONCEPTS])
        self.special_care_embeds = Parameter([_SPECIAL_CARE, config.projection_dim])
        self.special_care_embeds_weights = Parameter([_SPECIAL_CARE])

    def forward(self, op: Operators, pixel_values: ir.Value) -> tuple[ir.Value, ir.Value]:
        embeds = _normalize(op, op.cast(self.visual_projection(op, self.vision_model(op, pixel_values)), FLOAT))
        special_care = _similarities(op, embeds, self.special_care_embeds)
        concepts = _similarities(op, embeds, self.concept_embeds)
        return (
            op.Sub(special_care, self.special_care_embeds_weights),
            op.Sub(concepts, self.concept_embeds_weights),
        )


class _VisionModel(Module):
    """transformers' CLIPVisionModel, of which the pooled state is used."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.vision_model = ClipVisionTransformer(config)

    def forward(self, op: Operators, pixel_values: ir.Value) -> ir.Value:
        pooled, _ = self.vision_model(op, pixel_values)
        return pooled


def _similarities(op: Operators, embeds: ir.Value, concepts: Parameter) -> ir.Value:
    return op.MatMul(embeds, op.Transpose(_normalize(op, concepts), perm=[1, 0]))


def _normalize(op: Operators, vectors: ir.Value) -> ir.Value:
    return op.Div(vectors, op.Sqrt(op.ReduceSumSquare(vectors, [1], keepdims=1)))
