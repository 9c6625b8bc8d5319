"""Searches among stored points beside their references."""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from ds4mlx.custom_kernels.cases.base import Case, Pairs, normal
from ds4mlx.custom_kernels.codes import iq2_nearest


def nearest(eights: int, places: int) -> Pairs:
    """Eights of different sizes, whose values matter differently; codes fit float32."""
    x, w = normal((eights, places, 8), mx.float32, 1), mx.abs(normal((places, 8), mx.float32, 2))
    scale = mx.abs(normal((eights,), mx.float32, 3, 0.5))
    got, want = (side(x, scale, w) for side in (iq2_nearest.by_kernel, iq2_nearest.plain))
    return [(a.astype(mx.float32), b.astype(mx.float32)) for a, b in zip(got, want, strict=True)]


def small() -> Iterator[Case]:
    """An odd number of eights, and less than a threadgroup of them."""
    for eights, places in ((301, 1), (21, 4)):
        call = partial(nearest, eights, places)
        yield Case(f"iq2_nearest {eights}x{places}", mx.float32, call)


def wide() -> Iterator[Case]:
    """The levels of a group in many rows."""
    yield Case("iq2_nearest 4608x4", mx.float32, partial(nearest, 4608, 4))
