"""Operators that compute in 8 bits, for ONNX Runtime's CPU kernels: pictures are channels-last, activations codes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Parameter
from sdonnx_runtime.arrays import AnyArray

from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.operators.base import Operators, TransposedWeight, sizes
from sdonnx_export.operators.precision import PrecisionOf
from sdonnx_export.operators.quantized import Range

_ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class _Coded:
    """An activation in codes, and its range as values of the graph."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value


class Int8Operators(Operators):
    """`Operators` whose pictures are (N, H, W, C) inside, and whose int8 layers work on codes.

    Matrices, and kernels of one place, give float32 of codes (``MatMulIntegerToFloat``), whose range is found at each
    run, so that it follows timestep and prompt and never clips. Other kernels give codes (``QLinearConv``), whose range
    must be known beforehand. What several layers read is coded once.

    Args:
        graph: what is written to.
        weights: the checkpoint's.
        precision_of: those of the layers; what is not int8 computes in float32.
        ranges: of what each kernel reads and gives, by the name of its weight and by that with ``.output``; a kernel
            without computes in float32.
    """

    def __init__(
        self,
        graph: ir.Graph,
        weights: Mapping[str, Weight],
        precision_of: PrecisionOf,
        ranges: Mapping[str, Range] = MappingProxyType({}),
    ) -> None:
        super().__init__(graph, weights, precision_of)
        self._ranges = ranges
        self._coded: dict[tuple[ir.Value, str | None, str], _Coded] = {}
        self._joined: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def linear(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``x @ weight + bias``, over codes where the layer is int8."""
        if self.precision_of(str(weight.name)) != "int8":
            return super().linear(x, weight, bias)
        return self._product(self._code(x), weight, bias)

    def geglu(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``a * gelu(b)``; each half is a product of its own, so that nothing is split afterwards."""
        if self.precision_of(str(weight.name)) != "int8":
            return super().geglu(x, weight, bias)
        x_codes, half = self._code(x), sizes(weight)[1] // 2

        def part(start: int) -> ir.Value:
            columns = slice(start, start + half)
            mine = None if bias is None else self.Slice(bias, [columns.start], [columns.stop])
            return self._product(x_codes, weight, mine, columns=columns)

        hidden, gate = part(0), part(half)
        return self.Mul(hidden, self.gelu(gate))

    def conv(
        self,
        x: ir.Value,
        weight: Parameter,
        bias: Parameter | None,
        *,
        stride: int = 1,
        pads: Sequence[int],
        enlarged: bool = False,
        like: ir.Value | None = None,
    ) -> ir.Value:
        """2-D convolution of pictures (N, H, W, C); what is enlarged is so in codes."""
        name = str(weight.name)
        if sizes(weight)[2] == 1 and self.precision_of(name) == "int8":
            return self._pointwise(x, weight, bias)
        if self.precision_of(name) != "int8" or f"{name}.output" not in self._ranges:
            x = self.upsample(x, like) if enlarged else x
            y = super().conv(self.Transpose(x, perm=[0, 3, 1, 2]), weight, bias, stride=stride, pads=pads)
            return self.Transpose(y, perm=[0, 2, 3, 1])
        read = self._code(x, name)
        codes = self.upsample(read.codes, like) if enlarged else read.codes
        kernel, scale = self.store_codes(name, self.reader(weight), sizes(weight), axis=0)
        given = self._range(f"{name}.output")
        inputs = [read.scale, read.zero, kernel, scale, self.no_shift(kernel, scale), *given]
        how = {"strides": [stride, stride], "pads": list(pads), "channels_last": 1}
        y = self._contrib("QLinearConv", codes, *inputs, **how)
        y.shape = ir.Shape([None, None, None, sizes(weight)[0]])
        wide = self.DequantizeLinear(y, *given)
        return wide if bias is None else self.Add(wide, bias)

    def group_norm(self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float) -> ir.Value:
        """Group normalization (arXiv:1803.08494) of (N, H, W, C), from each channel's mean and mean square."""
        return self._normed(x, weight, bias, groups=groups, eps=eps)

    def _moments(self, x: ir.Value, groups: int) -> tuple[ir.Value, ir.Value]:
        """Of each group the mean and the mean square (N, G, 1)."""
        sums = self.ReduceSum(x, [2], keepdims=0), self.ReduceSumSquare(x, [2], keepdims=0)  # row by row: in parallel
        width = self.Cast(self.Shape(x, start=2, end=3), to=ir.DataType.FLOAT)
        means, squares = (self.ReduceMean(self.Div(each, width), [1]) for each in sums)  # (N, 1, C)
        mean, square = (
            self.ReduceMean(self.Reshape(each, [0, groups, -1]), [2], keepdims=1) for each in (means, squares)
        )
        return mean, square

    def _channels_of(self, channels: int) -> list[int]:
        """The shape of what is the same at all places of a picture."""
        return [0, 1, 1, channels]

    def _extent(self, picture: ir.Value) -> ir.Value:
        """Its height and width."""
        return self.Shape(picture, start=1, end=3)

    def from_input(self, x: ir.Value) -> ir.Value:
        """(N, C, H, W) to (N, H, W, C)."""
        return self.Transpose(x, perm=[0, 2, 3, 1])

    def to_output(self, x: ir.Value) -> ir.Value:
        """(N, H, W, C) to (N, C, H, W)."""
        return self.Transpose(x, perm=[0, 3, 1, 2])

    def join(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Two pictures' channels, one after the other; a matrix that reads them has a range for each."""
        joined = self.Concat(x, y, axis=-1)
        self._joined[joined] = (x, y)
        return joined

    def add_to_pixels(self, x: ir.Value, vector: ir.Value) -> ir.Value:
        """A picture with ``vector`` (N, C) added at each of its places."""
        return self.Add(x, self.Unsqueeze(vector, [1, 2]))

    def to_sequence(self, x: ir.Value, channels: int) -> ir.Value:
        """(N, H, W, C) to (N, H * W, C)."""
        return self.Reshape(x, [0, -1, channels])

    def to_picture(self, x: ir.Value, like: ir.Value) -> ir.Value:
        """(N, H * W, C) to (N, H, W, C), with the shape of ``like``."""
        return self.Reshape(x, self.Shape(like))

    def upsample(self, x: ir.Value, like: ir.Value | None = None) -> ir.Value:
        """Nearest-neighbour upsampling of (N, H, W, C), by 2 or to the height and width of ``like``."""
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        if like is None:
            return self.Resize(x, None, [1.0, 2.0, 2.0, 1.0], **options)
        size = self.Concat(self.Shape(x, end=1), self.Shape(like, start=1, end=3), self.Shape(x, start=3), axis=0)
        return self.Resize(x, None, None, size, **options)

    def _pointwise(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """A kernel of one place: a matrix over channels."""
        if x not in self._joined:
            return self._product(self._code(x), weight, bias)
        first, second = self._joined[x]
        border = first.shape[-1] if first.shape is not None else None
        if not isinstance(border, int):
            raise TypeError(f"{first.name} has {first.shape}: layers must say how many channels they give")
        y = self._product(self._code(first), weight, bias, rows=slice(0, border))
        return self.Add(y, self._product(self._code(second), weight, None, rows=slice(border, None)))

    def _product(
        self, x: _Coded, weight: Parameter, bias: ir.Value | None, *, rows: slice = _ALL, columns: slice = _ALL
    ) -> ir.Value:
        """``x @ weight[rows, columns] + bias`` in float32."""
        whole = sizes(weight)[:2] if isinstance(weight, TransposedWeight) else sizes(weight)[1::-1]
        shape = tuple(len(range(size)[part]) for size, part in zip(whole, (rows, columns), strict=True))
        name = "".join([str(weight.name), *(f"_{part.start}" for part in (rows, columns) if part is not _ALL)])
        read = self.reader(weight)

        def matrix() -> AnyArray:
            data = read()
            return np.ascontiguousarray((data if data.ndim == 2 else data[:, :, 0, 0].T)[rows, columns])

        codes, scale = self.store_codes(name, matrix, shape, axis=1)
        inputs = [codes, x.scale, scale, x.zero, self.no_shift(codes, scale), *([] if bias is None else [bias])]
        y = self._contrib("MatMulIntegerToFloat", x.codes, *inputs)
        y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), _with_last(x.codes.shape, shape[1])
        return y

    def _code(self, x: ir.Value, name: str | None = None) -> _Coded:
        """``x`` in codes of the range called ``name``; without a name, of the range that it has in each run."""
        key = x, name, self.stage  # codes that two stages read would be an edge between them
        if key not in self._coded:
            if name is None:
                codes, scale, zero = self.DynamicQuantizeLinear(x, _outputs=3)
            else:
                scale, zero = self._range(name)
                codes = self.QuantizeLinear(x, scale, zero)
            self._coded[key] = _Coded(codes=codes, scale=scale, zero=zero)
        return self._coded[key]

    def _range(self, name: str) -> tuple[ir.Value, ir.Value]:
        found = self._ranges[name]
        scale = self.constant(f"{name}.scale", np.array(found.scale, np.float32))
        return scale, self.constant(f"{name}.zero", np.array(found.zero, np.uint8))


def _with_last(shape: ir.Shape | None, size: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*shape[:-1], size])
