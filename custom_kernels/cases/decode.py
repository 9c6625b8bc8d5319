"""Values of stored matrices by the kernel beside those by plain operations."""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from ds4mlx.custom_kernels.cases.base import Case, Pairs
from ds4mlx.custom_kernels.products import decode
from ds4mlx.custom_kernels.products.dense import DECODED
from ds4mlx.custom_kernels.random_weights import random_planes

F32, BF16 = mx.float32, mx.bfloat16


def values(format: str, dtype: mx.Dtype, shape: tuple[int, ...]) -> Pairs:
    planes = random_planes(format, shape, 1)
    got = decode.decode(format, planes, dtype)
    return [(got, decode.reference(format, planes, F32))]


def small() -> Iterator[Case]:
    """Every format and type, with a last threadgroup that has few groups of columns."""
    for dtype in (F32, BF16):
        for format in DECODED:
            shape = (3, 7, 256) if format in ("q2_k", "iq2_xxs") else (21, 256)
            yield _case(format, dtype, shape)
        for format in ("mxfp8", "q8_0", "mxfp4"):
            yield _case(format, dtype, (2, 5, 416))


def wide() -> Iterator[Case]:
    """Rows of Flash's widths."""
    for dtype in (F32, BF16):
        for format in DECODED:
            yield _case(format, dtype, (5, 8192))


def _case(format: str, dtype: mx.Dtype, shape: tuple[int, ...]) -> Case:
    call = partial(values, format, dtype, shape)
    return Case(f"decode {format} {'x'.join(map(str, shape))}", dtype, call)
