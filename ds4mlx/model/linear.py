"""Matrices of the model: one, several side by side, or a stack of experts.

Their planes are the module's parameters; `format` names the one that reads them. A matrix that
multiplies may have an adapter beside it, of two parameters more.
"""

import math
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from ds4mlx.custom_kernels.layer.plain import rms_norm
from ds4mlx.custom_kernels.products import trained
from ds4mlx.custom_kernels.products.dense import product
from ds4mlx.custom_kernels.products.experts import Operand
from ds4mlx.formats import FORMATS
from ds4mlx.model.module import Module
from ds4mlx.state.kind import digest


class Matrix(Module):
    """A stored weight of logical shape (out, in) or (experts, out, in)."""

    def __init__(self, *shape: int):
        super().__init__()
        self._shape, self.format = shape, "f32"
        self.store("f32")

    def store(self, format: str) -> None:
        """Hold the weight in a format, a key of FORMATS, from now on; its values are unset."""
        for plane in FORMATS[self.format].layout:
            self.pop(plane, None)
        self.format = format
        for plane, empty in FORMATS[self.format].empty(self._shape).items():
            self[plane] = empty

    @property
    def rows(self) -> int:
        """Rows of the matrix: values that it makes of an input."""
        return self._shape[-2]

    @property
    def planes(self) -> dict[str, mx.array]:
        """The arrays that hold the weight, by name."""
        return {plane: self[plane] for plane in FORMATS[self.format].layout}

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self._shape

    @staticmethod
    def trainable_parameter_filter(module: nn.Module, key: str, value: Any) -> bool:
        """Plain values can be trained; the scales of codes cannot, whatever their type."""
        assert isinstance(module, Matrix)
        layout = FORMATS[module.format].layout
        coded = key in layout and len(layout) > 1
        return not coded and Module.trainable_parameter_filter(module, key, value)

    def _extra_repr(self) -> str:
        return f"{', '.join(map(str, self._shape))}, {self.format}"

    def decode(self) -> mx.array:
        """The weight's values, float32, in its logical shape, without an adapter."""
        return FORMATS[self.format].decode(self.planes)


class Projection(Matrix):
    """A matrix that multiplies: W, or with an adapter (LoRA) W + scale * (lora_a . lora_b)^T.

    The adapter's parameters are lora_a (in, rank) and lora_b (rank, out), where out are the stored
    rows: of all groups of a `GroupedLinear`, of each expert of an `ExpertStack`, whose experts share
    one adapter.
    """

    scale = dropout = 0.0  # of the adapter

    def to_lora(self, r: int = 8, scale: float = 20.0, dropout: float = 0.0) -> Self:
        """Have an adapter of rank `r` from now on, which adds nothing yet; frozen is what was before.

        Named, and called, as mlx-lm's tools do with a layer that makes its own adapter.
        dropout: the share of the adapter's inputs that is left out in training.
        """
        self.freeze()
        *_, rows, columns = self._shape
        spread = 1 / math.sqrt(columns)
        self.lora_a = mx.random.uniform(-spread, spread, (columns, r))
        self.lora_b = mx.zeros((r, rows))
        self.scale, self.dropout = scale, dropout
        return self

    def drop_lora(self) -> None:
        """Have no adapter any more."""
        del self["lora_a"], self["lora_b"]

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter."""
        return "lora_a" in self

    def adjusted(self, out: mx.array, x: mx.array) -> mx.array:
        """The product `out` (..., out) of x (..., in), with what the adapter adds to it."""
        if not self.adapted:
            return out
        if self.training and self.dropout:
            kept = 1 - self.dropout
            x = x * mx.random.bernoulli(kept, x.shape) / kept
        return out + (self.scale * self.raised(x @ self.lora_a)).astype(out.dtype)

    def raised(self, low: mx.array) -> mx.array:
        """What lora_b makes of (..., rank)."""
        return low @ self.lora_b


class Linear(Projection):
    """y = x . W^T in x's type; x: (..., in) -> (..., out)."""

    def __call__(self, x: mx.array) -> mx.array:
        multiply = trained.product if self.training else product
        return self.adjusted(multiply(self.format, self.planes, x), x)


class GroupedLinear(Projection):
    """`groups` matrices (out, in) kept as the rows of one; group g of the input meets the g-th."""

    def __init__(self, groups: int, out_dims: int, in_dims: int):
        super().__init__(groups * out_dims, in_dims)
        self.groups = groups

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., groups, in) -> (..., groups, out)."""
        planes = {p: a.reshape(self.groups, -1, a.shape[-1]) for p, a in self.planes.items()}
        rows = mx.swapaxes(x.reshape(-1, self.groups, x.shape[-1]), 0, 1)
        multiply = trained.product if self.training else product
        out = multiply(self.format, planes, rows)
        return self.adjusted(mx.swapaxes(out, 0, 1).reshape(*x.shape[:-1], -1), x)

    def raised(self, low: mx.array) -> mx.array:
        """(..., groups, rank) -> (..., groups, out): each group has its own columns of lora_b."""
        own = self.lora_b.reshape(len(self.lora_b), self.groups, -1).swapaxes(0, 1)
        return (low[..., None, :] @ own).squeeze(-2)


class Embedding(Matrix):
    """A row per token id."""

    def __call__(self, ids: mx.array) -> mx.array:
        """int (...) -> (..., width), float32 or the type of plain values."""
        rows = {plane: array[ids] for plane, array in self.planes.items()}
        return rows["weight"] if len(rows) == 1 else FORMATS[self.format].decode(rows)


class ExpertStack(Projection):
    """One projection of every routed expert of a layer, (experts, out, in)."""

    def __call__(self, x: mx.array, experts: mx.array, ordered: bool = False) -> mx.array:
        """x: (..., 1, in), experts: int (...) -> (..., 1, out); `ordered`: experts ascend."""
        if self.training:
            out = trained.gather(self.format, self.planes, x, experts, ordered)
        else:
            out = FORMATS[self.format].gather(self.planes, x, experts, ordered)
        return self.adjusted(out, x)

    @property
    def operand(self) -> Operand | None:
        """What a kernel may multiply by instead of calling this; none where more is to be done."""
        if self.adapted or type(self).__call__ is not ExpertStack.__call__:
            return None
        return Operand(self.format, self.planes, self._shape)


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight, float32 inside, in x's type; over the last axis."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


def projections(model: nn.Module) -> dict[str, Projection]:
    """The matrices of a model that can have an adapter, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Projection)}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Their shapes."""
    return {name: matrix.shape for name, matrix in projections(model).items()}


def digest_of_adapters(model: nn.Module) -> str | None:
    """A name for the adapters of a model, None where there are none."""
    found = {n: m for n, m in sorted(projections(model).items()) if m.adapted}
    parts = {f"{n} {m.scale}": (m.lora_a, m.lora_b) for n, m in found.items()}
    return (
        digest((name, array) for name, pair in parts.items() for array in pair) if parts else None
    )
