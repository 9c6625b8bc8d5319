"""What every format offers: its planes, the products, and the values they multiply by.

A format is one class with its layout, the plain products and, where there are any, its kernels.
Weights are (out, in) or, stacked, (experts, out, in); planes keep the leading axes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import mlx.core as mx

from ds4mlx.formats.tags import DTYPES

Planes = Mapping[str, mx.array]


class Format(ABC):
    """A way to store a matrix, or a stack of them, as a few arrays called planes."""

    name: str
    # Plane -> (type tag, bits a weight). The first plane is always called "weight".
    layout: dict[str, tuple[str, float]]
    # The input width is a multiple of this many weights.
    block: int = 1

    @property
    def bits(self) -> float:
        """Bits a weight, scales included."""
        return sum(bits for _, bits in self.layout.values())

    def widths(self, columns: int) -> dict[str, int]:
        """Elements of each plane in a row of so many weights."""
        sizes = {tag: 8 * dtype.size for tag, dtype in DTYPES.items()}
        return {p: int(columns * bits) // sizes[tag] for p, (tag, bits) in self.layout.items()}

    def empty(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """Unevaluated planes of a weight of this logical shape, to be replaced by loaded ones."""
        *rows, columns = shape
        widths = self.widths(columns)
        return {p: mx.zeros((*rows, widths[p]), DTYPES[t]) for p, (t, _) in self.layout.items()}

    @abstractmethod
    def matmul(self, planes: Planes, x: mx.array) -> mx.array:
        """x (..., in) -> (..., out), or for planes of (G, out, in): (G, n, in) -> (G, n, out)."""

    @abstractmethod
    def gather(self, planes: Planes, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        """x (..., 1, in), experts int (...) -> (..., 1, out); `ordered`: experts ascend."""

    @abstractmethod
    def decode(self, planes: Planes) -> mx.array:
        """The values that the products multiply by, float32, in the logical shape."""
