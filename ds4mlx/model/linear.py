"""Matrices of the model: one, several side by side, or a stack of experts.

Their planes are the module's parameters; `format` names the one that reads them.
"""

import mlx.core as mx

from ds4mlx.custom_kernels.layer.plain import rms_norm
from ds4mlx.custom_kernels.products.dense import product
from ds4mlx.custom_kernels.products.experts import Operand
from ds4mlx.formats import FORMATS
from ds4mlx.model.module import Module


class Matrix(Module):
    """A stored weight of logical shape (out, in) or (experts, out, in)."""

    def __init__(self, *shape: int):
        super().__init__()
        self._shape = shape
        self.store("f32")

    def store(self, format: str) -> None:
        """Hold the weight in a format, a key of FORMATS, from now on; its values are unset."""
        for plane in [name for name, value in self.items() if isinstance(value, mx.array)]:
            del self[plane]
        self.format = format
        for plane, empty in FORMATS[self.format].empty(self._shape).items():
            self[plane] = empty

    @property
    def planes(self) -> dict[str, mx.array]:
        """The arrays that hold the weight, by name."""
        return {plane: self[plane] for plane in FORMATS[self.format].layout}

    def _extra_repr(self) -> str:
        return f"{', '.join(map(str, self._shape))}, {self.format}"

    def decode(self) -> mx.array:
        """The weight's values, float32, in its logical shape."""
        return FORMATS[self.format].decode(self.planes)


class Linear(Matrix):
    """y = x . W^T in x's type; x: (..., in) -> (..., out)."""

    def __call__(self, x: mx.array) -> mx.array:
        return product(self.format, self.planes, x)


class GroupedLinear(Matrix):
    """`groups` matrices (out, in) kept as the rows of one; group g of the input meets the g-th."""

    def __init__(self, groups: int, out_dims: int, in_dims: int):
        super().__init__(groups * out_dims, in_dims)
        self.groups = groups

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., groups, in) -> (..., groups, out)."""
        planes = {p: a.reshape(self.groups, -1, a.shape[-1]) for p, a in self.planes.items()}
        rows = mx.swapaxes(x.reshape(-1, self.groups, x.shape[-1]), 0, 1)
        out = product(self.format, planes, rows)
        return mx.swapaxes(out, 0, 1).reshape(*x.shape[:-1], -1)


class Embedding(Matrix):
    """A row per token id."""

    def __call__(self, ids: mx.array) -> mx.array:
        """int (...) -> (..., width), float32 or the type of plain values."""
        rows = {plane: array[ids] for plane, array in self.planes.items()}
        return rows["weight"] if len(rows) == 1 else FORMATS[self.format].decode(rows)


class ExpertStack(Matrix):
    """One projection of every routed expert of a layer, (experts, out, in)."""

    def __call__(self, x: mx.array, experts: mx.array, ordered: bool = False) -> mx.array:
        """x: (..., 1, in), experts: int (...) -> (..., 1, out); `ordered`: experts ascend."""
        return FORMATS[self.format].gather(self.planes, x, experts, ordered)

    @property
    def operand(self) -> Operand | None:
        """What a kernel may multiply by instead of calling this; none where a subclass is called."""
        if type(self).__call__ is not ExpertStack.__call__:
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
