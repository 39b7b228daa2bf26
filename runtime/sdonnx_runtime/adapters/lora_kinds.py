"""Kinds of adapters: the tensors of each, and the change of a weight or bias that they give."""

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import Array

Tensors: TypeAlias = Mapping[str, Array]
"""A layer's tensors by the values of PARAMETERS."""

Change: TypeAlias = Callable[[Tensors, Array], Array]
"""Computes the difference, (out, n) or of its size, from a layer's tensors and its weight (out, n)."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of adapter."""

    needed: Set[str]
    optional: Set[str] = frozenset()
    change: Change | None = None
    """The difference of the weight; None if it stays."""
    change_bias: Change | None = None
    """The difference of the bias (out,), besides that which any kind can have in the file."""
    rank: str | None = None
    """The tensor whose length is the rank that alpha is divided by; None if alpha is no factor."""
    takes_scale: bool = False
    """Whether ``change`` reads the scale from the tensors, because the difference is not proportional to it."""

    def changes_bias(self, names: Collection[str]) -> bool:
        """Whether tensors of these names change the bias too."""
        return self.change_bias is not None or not BIASES.isdisjoint(names)


BIASES = {"bias_difference", "up_bias"}
"""Tensors that change a layer's bias."""


def find_kind(names: Collection[str]) -> Kind | None:
    """Find the kind that such tensors make, of which none is left over; None if they make none."""
    weight = {*names} - {"bias_difference"}
    return next((kind for kind in KINDS if kind.needed <= weight <= kind.needed | kind.optional), None)


def low_rank(tensors: Tensors, weight: Array) -> Array:
    """LoRA, and LoCon (arXiv:2309.14859) with or without a core, and what LyCORIS' extraction left over, sparse."""
    difference = _product(tensors["up"], tensors["down"], tensors.get("mid"), weight)
    if "sparse_values" in tensors:
        shape = tuple(int(size) for size in tensors["sparse_size"])
        positions = np.ravel_multi_index(tuple(tensors["sparse_indices"].astype(np.int64)), shape)
        np.add.at(difference.reshape(-1), positions, tensors["sparse_values"])
    return difference


def _product(up: Array, down: Array, core: Array | None, weight: Array) -> Array:
    """``up @ down``, with a conv's core (r, r, k, k) between them: (out, in * k * k)."""
    up, down = _flat(up), _flat(down)
    if core is not None:
        _check_size(len(core) * down.shape[1] * core[0, 0].size, weight)
        down = _flat(np.einsum("mnkl,ni->mikl", core, down))
    _check_size(len(up) * down.shape[1], weight)
    return up @ down


def _check_size(size: int, weight: Array) -> None:
    """Refuse an intermediate that is far larger than the weight, before it is computed."""
    if size > 16 * weight.size + 2**16:
        raise ValueError(f"give {size} weights")


def hadamard(tensors: Tensors, weight: Array) -> Array:
    """LoHa (arXiv:2108.06098): the element-wise product of two low-rank matrices."""
    first, second = (
        _low_rank_factor(tensors.get(f"hada_t{n}"), tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"], weight)
        for n in (1, 2)
    )
    first *= second
    return _flat(first)


def kronecker(tensors: Tensors, weight: Array) -> Array:
    """LoKr (arXiv:2212.10650): the Kronecker product of two weights, of low rank or not."""
    first, second = (
        tensors[name]
        if (name := f"lokr_w{n}") in tensors
        else _low_rank_factor(tensors.get(f"lokr_t{n}"), tensors[f"{name}_a"], tensors[f"{name}_b"], weight)
        for n in (1, 2)
    )
    _check_size(first.size * second.size, weight)
    return _flat(np.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second))


def _low_rank_factor(core: Array | None, a: Array, b: Array, weight: Array) -> Array:
    """``a @ b``; or a conv weight from its Tucker core (r, r, k, k), ``a`` (r, out) and ``b`` (r, in)."""
    if core is None:
        return _product(a, b, None, weight).reshape(len(a), *b.shape[1:])
    _check_size(a.shape[1] * b.shape[1] * core[0, 0].size, weight)
    return np.einsum("ijkl,jr,ip->prkl", core, b, a)


def generalized(tensors: Tensors, weight: Array) -> Array:
    """GLoRA (arXiv:2306.07967): a low-rank map of the layer's inputs, and a low-rank difference."""
    a1, a2 = _flat(tensors["glora_a1"]), _flat(tensors["glora_a2"])  # (in, r), (r, in)
    by_input = _by_input(weight, len(a1), tensors["glora_a1"])
    mapped = _flat(np.einsum("ork,rj->ojk", np.einsum("oik,ir->ork", by_input, a1), a2))
    difference = _product(tensors["glora_b1"], tensors["glora_b2"], tensors.get("glora_bm"), weight)
    if difference.shape != mapped.shape:
        raise ValueError(f"are for {difference.size} and {mapped.size} weights")
    return difference + mapped


def _by_input(weight: Array, inputs: int, tensor: Array) -> Array:
    """The weight as (out, inputs, k * k); only a tensor of a conv, which has 4 axes, leaves room for a kernel."""
    if tensor.ndim < 4 and weight.shape[1] != inputs:
        raise ValueError(f"are for {inputs} inputs")
    return weight.reshape(len(weight), inputs, -1)


def _rotation(tensors: Tensors, weight: Array) -> Array:
    return (rotation if tensors["oft_blocks"].ndim == 3 else butterfly)(tensors, weight)


def rotation(tensors: Tensors, weight: Array) -> Array:
    """Diag-OFT (arXiv:2306.07280): rotates blocks of outputs; ``scale`` interpolates to the identity."""
    rotations = _interpolated_rotations(tensors, len(weight))  # (blocks, n, n)
    blocks = weight.reshape(*rotations.shape[:2], -1)
    rotated = np.einsum("knm,knr->kmr", rotations, blocks).reshape(weight.shape)
    return _rescale(tensors, rotated) - weight


def butterfly(tensors: Tensors, weight: Array) -> Array:
    """BOFT (arXiv:2311.06243): rotations of blocks of outputs in stages; ``scale`` interpolates each."""
    rotated, size = weight, tensors["oft_blocks"].shape[-1]
    for stage, rotations in enumerate(_interpolated_rotations(tensors, len(weight))):
        stride = 2**stage * (size // 2)
        blocks = rotated.reshape(-1, 2, stride, weight.shape[1]).swapaxes(1, 2).reshape(-1, size, weight.shape[1])
        blocks = np.einsum("bij,bjn->bin", rotations, blocks)
        rotated = blocks.reshape(-1, stride, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return _rescale(tensors, rotated) - weight


def _interpolated_rotations(tensors: Tensors, outputs: int) -> Array:
    """Cayley transforms of skew-symmetric blocks, whose norm alpha limits, times ``scale`` to the identity."""
    skew = tensors["oft_blocks"] - tensors["oft_blocks"].swapaxes(-1, -2)
    limit = outputs * float(tensors["alpha"].reshape(-1)[0]) if "alpha" in tensors else 0.0
    norm = float(np.linalg.norm(skew)) + 1e-8
    if 0 < limit < norm:
        skew = skew * np.float32(limit / norm)
    identity, scale = np.eye(skew.shape[-1], dtype=np.float32), np.float32(tensors["scale"])
    return scale * ((identity + skew) @ np.linalg.inv(identity - skew)) + (1 - scale) * identity


def _rescale(tensors: Tensors, weight: Array) -> Array:
    return weight * tensors["rescale"].reshape(-1, 1) if "rescale" in tensors else weight


def channel_scale(tensors: Tensors, weight: Array) -> Array:
    """(IA)^3 (arXiv:2205.05638) of LyCORIS: one factor for each input or output."""
    factors = tensors["ia3_weight"].reshape(-1)
    if not tensors["on_input"].reshape(-1)[0]:
        return weight * factors.reshape(len(weight), 1)
    return _flat(_by_input(weight, len(factors), tensors["ia3_weight"]) * factors[:, None])


def activation_scale(tensors: Tensors, weight: Array) -> Array:
    """(IA)^3 of peft: (1, in) scales the inputs, (out, 1) the outputs."""
    factors = tensors["ia3_l"] - np.float32(1)
    if factors.ndim != 2:
        raise ValueError("(IA)^3 of a conv layer doesn't say whether it scales inputs or outputs")
    return weight * factors


def activation_bias(tensors: Tensors, bias: Array) -> Array:
    """(IA)^3 of peft that scales the outputs scales the bias with them."""
    factors = tensors["ia3_l"]
    return bias * (factors[:, 0] - np.float32(1)) if factors.shape[1] == 1 else np.zeros_like(bias)


def normalize(weight: Array, difference: Array, tensors: Tensors) -> Array:
    """DoRA (arXiv:2402.09353): the delta to the sum rescaled to the trained norms, per output or per input."""
    norms = tensors.get("output_norms", tensors.get("norms"))
    if norms is None:
        return difference
    difference = np.ascontiguousarray(difference)
    difference += weight
    by_output = "output_norms" in tensors or len(norms) == len(weight)
    blocks = difference[:, None] if by_output else _by_input(difference, norms.size, norms)
    squares = [np.square(block).sum(axis=1) for block in blocks]  # (outputs, inputs), one output at a time: large
    sums = np.sqrt(squares if by_output else np.sum(squares, axis=0, keepdims=True))
    blocks *= (norms.reshape(sums.shape) / (sums + np.finfo(np.float32).eps))[:, :, None]
    difference -= weight
    return difference


def _flat(data: Array) -> Array:
    return data.reshape(len(data), -1)


def _difference(tensors: Tensors, _weight: Array) -> Array:
    """The whole difference: LyCORIS' full, and of a norm."""
    return _flat(tensors["difference"])


_ALPHA = {"alpha", "scalar"}
_DORA = {*_ALPHA, "norms", "output_norms"}
_SPARSE = {"sparse_indices", "sparse_values", "sparse_size"}
_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_GLORA = {"glora_a1", "glora_a2", "glora_b1", "glora_b2"}
_W1, _W2 = {"lokr_w1_a", "lokr_w1_b"}, {"lokr_w2_a", "lokr_w2_b"}

KINDS = (
    Kind(change=low_rank, rank="down", needed={"down", "up"}, optional={"mid", "up_bias", *_DORA}),
    Kind(change=low_rank, rank="down", needed={"down", "up", *_SPARSE}, optional={"mid", *_ALPHA}),
    Kind(change=hadamard, rank="hada_w1_b", needed=_HADA, optional=_DORA),
    Kind(change=hadamard, rank="hada_w1_b", needed={*_HADA, "hada_t1", "hada_t2"}, optional=_DORA),
    Kind(change=kronecker, needed={"lokr_w1", "lokr_w2"}, optional=_DORA),
    Kind(change=kronecker, rank="lokr_w2_b", needed={"lokr_w1", *_W2}, optional={"lokr_t2", *_DORA}),
    Kind(change=kronecker, rank="lokr_w1_b", needed={*_W1, "lokr_w2"}, optional=_DORA),
    Kind(change=kronecker, rank="lokr_w1_b", needed={*_W1, *_W2}, optional={"lokr_t2", *_DORA}),
    Kind(change=generalized, rank="glora_a2", needed=_GLORA, optional={"glora_bm", *_ALPHA}),
    Kind(change=_difference, needed={"difference"}, optional={"alpha"}),
    Kind(change=_rotation, needed={"oft_blocks"}, optional={"rescale", "alpha"}, takes_scale=True),
    Kind(change=channel_scale, needed={"ia3_weight", "on_input"}),
    Kind(change=activation_scale, needed={"ia3_l"}, change_bias=activation_bias),
    Kind(needed=set(), optional={"alpha"}),
)
"""All kinds of adapters; the last one changes a bias at most."""
