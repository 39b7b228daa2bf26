"""Operators for ONNX Runtime's CUDA provider: channels-last, in its fused operators of diffusion models.

The constraints are those of onnxruntime/contrib_ops/cuda/diffusion, of 1.22 to 1.30.
"""

import onnx_ir as ir
from onnxscript.nn import Parameter

from sdonnx_export.operators.base import ConvSpec, UnidirectionalAttention
from sdonnx_export.operators.channels_last import ChannelsLast
from sdonnx_export.operators.layouts import ConvLayout, Kernel, PointwiseKernel, lay_out, sizes
from sdonnx_export.operators.stored import FLOAT

_MAX_GROUP = 512
"""Channels of a group that a block of GroupNorm's kernel has threads for."""

_SPLIT_GELU_WIDTHS = (2560, 5120, 6144, 10240, 12288)
"""Widths that BiasSplitGelu is compiled for."""


class CudaOperators(UnidirectionalAttention, ChannelsLast):
    """`Operators` for CUDA: convolutions of (N, H, W, C), group norms with SiLU in one pass, GEGLU in one pass.

    Where a fused operator has no kernel for a layer's sizes, the layer is written in others that have one.
    """

    def conv(self, x: ir.Value, spec: ConvSpec) -> ir.Value:
        """2-D convolution of (N, H, W, C); one of 1x1 is a MatMul, which needs no plan for each size."""
        dtype = self.dtype_of(spec.weight)
        x = self.cast(self._conv_input(x, spec), dtype)
        bias = [] if spec.bias is None else [self.parameter(spec.bias, dtype)]
        if spec.is_pointwise and spec.stride == 1 and not any(spec.pads):
            y = self.MatMul(x, self._kernel(spec.weight, PointwiseKernel))
            return self.Add(y, *bias) if bias else y
        outputs, _, *size = sizes(spec.weight)
        options = {**spec.attributes, "kernel_shape": size}
        y = self._contrib("NhwcConv", x, self._kernel(spec.weight, Kernel), *bias, **options)
        y.shape = ir.Shape([None, None, None, outputs])
        return y

    def _kernel(self, weight: Parameter, layout: ConvLayout) -> ir.Value:
        """A conv weight in a layout of its own, as the graph's initializer: NhwcConv takes no computed weights."""
        initializers, name = self.builder.root.graph.initializers, str(weight.name)
        if initializers[name] is weight:
            initializers[name] = lay_out(weight, layout)
            initializers[name].type = ir.TensorType(self.dtype_of(weight))
        return initializers[name]

    def group_norm(
        self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float, silu: bool = False
    ) -> ir.Value:
        """Group normalization of (N, H, W, C) and SiLU in one node.

        The kernel takes two channels of a group at a time. Groups of odd size, and tiles with the statistics of the
        whole image, are normalized in float32 from sums.
        """
        size = sizes(weight)[0] // groups
        if self._image_stats is not None or size % 2 != 0 or size > _MAX_GROUP:
            return super().group_norm(x, weight, bias, groups=groups, eps=eps, silu=silu)
        affine = (self.norm_parameter(each) for each in (weight, bias))
        options = {"activation": int(silu), "channels_last": 1, "epsilon": eps, "groups": groups}
        return self._contrib("GroupNorm", self.cast(x, self.dtype_of(weight)), *affine, **options)

    def norm_parameter(self, vector: Parameter) -> ir.Value:
        """A group norm's weight or bias, which GroupNorm's kernel reads as float32 alone."""
        return self.parameter(vector, FLOAT)

    def geglu(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``a * gelu(b)`` of the two halves of ``x @ weight + bias``, in one node after the MatMul."""
        width = sizes(weight)[1]
        if bias is None or width not in _SPLIT_GELU_WIDTHS:
            return super().geglu(x, weight, bias)
        dtype = self.dtype_of(weight)
        y = self.MatMul(self.cast(x, dtype), self.matrix(weight))
        y = self._contrib("BiasSplitGelu", y, self.parameter(bias, dtype))
        y.shape = ir.Shape([None, None, width // 2])
        return y
