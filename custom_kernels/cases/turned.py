"""Rows of many tokens by the kernel beside those by plain operations."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.cases.base import Case, Forms, Pairs, normal
from ds4mlx.custom_kernels.cases.rows import stepped
from ds4mlx.custom_kernels.layer import turned_rows
from ds4mlx.custom_kernels.layer.row_layout import RowLayout

# What is made: the kind of rows, how they are normed, whether they are Hadamard-transformed.
QUERIES: Any = ("plain", "unit", False)
PLAIN: Any = ("plain", "weighted", False)
KV: Any = ("kv", "weighted", False)
INDEX: Any = ("index", "weighted", True)
INDEX_QUERIES: Any = ("rounded", "", True)
PLAIN_INDEX_QUERIES: Any = ("plain", "", False)


def compare(
    made: Any, dtype: mx.Dtype, width: int, rope: int, shape: tuple[int, ...], forms: Forms
) -> Pairs:
    """shape: of the rows, (N,) or (N, H)."""
    kind, normed, spread = made
    kv, index = forms(width, width, rope, dtype, True)
    form = kv if kind == "kv" else index if spread else forms(width, width, rope, dtype, False)[0]
    layout = RowLayout(kind, width, width, dtype) if kind == "rounded" else form.layout
    x = normal((*shape, width), dtype, 1, 2.0)
    turns = mx.random.uniform(-3, 3, (shape[0], rope // 2), key=mx.random.key(2))
    options: dict[str, Any] = {"normed": normed, "eps": 1e-6, "spread": spread}
    if normed == "weighted":
        options["norm"] = (1 + normal((width,), mx.float32, 3, 0.2)).astype(dtype)
    sides = x, (mx.cos(turns), mx.sin(turns))
    got = turned_rows.by_kernel(*sides, layout, **options).reshape(-1, layout.elements)
    want = turned_rows.plain(*sides, form, **options).reshape(len(got), -1)
    if kind == "plain":
        return [(got, want)]
    values = got.astype(mx.float32) if kind == "rounded" else form.unpack(got)
    return [stepped(values, form.unpack(want), form, values.size // 12)]


def small(forms: Forms) -> Iterator[Case]:
    """All that is made, in both types, of rows that leave a threadgroup half full."""
    for dtype in (mx.float32, mx.bfloat16):
        for made in (QUERIES, PLAIN, KV, PLAIN_INDEX_QUERIES):
            yield _case(made, dtype, 192, 64, (5,), forms)
        yield _case(QUERIES, dtype, 64, 32, (3, 7), forms)
        yield _case(KV, dtype, 128, 64, (9,), forms)
        for made in (INDEX, INDEX_QUERIES):
            yield _case(made, dtype, 64, 16, (3, 3), forms)
            yield _case(made, dtype, 128, 64, (5,), forms)


def wide(forms: Forms) -> Iterator[Case]:
    """Flash's sizes."""
    for dtype in (mx.bfloat16, mx.float32):
        for made in (QUERIES, KV):
            yield _case(made, dtype, 512, 64, (2, 64)[: 2 if made is QUERIES else 1], forms)
        for made in (INDEX, INDEX_QUERIES):
            yield _case(made, dtype, 128, 64, (2, 64)[: 2 if made is INDEX_QUERIES else 1], forms)


def _case(
    made: Any, dtype: mx.Dtype, width: int, rope: int, shape: tuple[int, ...], forms: Forms
) -> Case:
    name = turned_rows.name(*made)
    call = partial(compare, made, dtype, width, rope, shape, forms)
    return Case(f"{name} {shape} of {width}, {rope}", dtype, call)
