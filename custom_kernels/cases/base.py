"""What a comparison of a kernel with its reference is."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels.layer.row_layout import Form

# (width of KV rows, of index rows, channels that turn, type of activations, whether rows are coded)
# -> the forms of KV rows and of index rows.
Forms = Callable[[int, int, int, mx.Dtype, bool], tuple[Form, Form]]
TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 4e-3}
Pairs = list[tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Case:
    """A comparison: what it is called, the type of the activations, and how to compute both sides."""

    name: str
    dtype: mx.Dtype
    compute: Callable[[], Pairs]

    def error(self) -> float:
        """Largest norm of a difference over the norm of what it should be."""
        return max(relative(got, want) for got, want in self.compute())


def relative(got: mx.array, want: mx.array) -> float:
    """Norm of the difference over the norm, in float64; infinite where a value is not finite."""
    a, b = (np.array(x.astype(mx.float32), np.float64) for x in (got, want))
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int, scale: float = 1.0) -> mx.array:
    return (scale * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)
