"""What lies in a part of an array: one of several products side by side, or other values behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx


class Columns(NamedTuple):
    """Columns `begin` to `begin + width` of an array (N, all)."""

    array: mx.array
    begin: int
    width: int

    @property
    def value(self) -> mx.array:
        """They alone, (N, width)."""
        return self.array[:, self.begin : self.begin + self.width]

    @property
    def aligned(self) -> bool:
        """Whether kernels can load them four at a time, in every row."""
        rows, every = self.array.shape
        return self.begin % 4 == 0 and (rows == 1 or every % 4 == 0)


@dataclass(frozen=True)
class Inside:
    """A row (1, width) of a type that lies, bit by bit, in a row of float32 from float `begin` on."""

    array: mx.array
    begin: int
    width: int
    dtype: mx.Dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Of the row, as of an array."""
        return 1, self.width

    @property
    def at(self) -> int:
        """Where it begins, counted in values of its type."""
        return self.begin * self.array.dtype.size // self.dtype.size

    @property
    def value(self) -> mx.array:
        """The row alone."""
        end = self.begin + self.width * self.dtype.size // mx.float32.size
        return self.array[:, self.begin : end].view(self.dtype)


def whole(array: mx.array) -> Columns:
    """All columns of (N, all)."""
    return Columns(array, 0, array.shape[1])


def side_by_side(array: mx.array, widths: Sequence[int]) -> list[Columns]:
    """All columns of (N, all), cut into parts of these widths."""
    begins = accumulate(widths, initial=0)
    return [Columns(array, begin, width) for begin, width in zip(begins, widths, strict=False)]
