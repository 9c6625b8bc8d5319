"""The arrays in which one layer of a decode state keeps its rows, as kernels take them."""

from typing import NamedTuple

import mlx.core as mx


class Recent(NamedTuple):
    """The last rows: `old` (KEEP, ...) come before the settled position, `tail` (SPAN, ...) from it on."""

    old: mx.array
    tail: mx.array


class Grown(NamedTuple):
    """All rows: those settled in `full` (capacity, elements), the newer ones in `tail` (TAIL, elements)."""

    full: mx.array
    tail: mx.array
