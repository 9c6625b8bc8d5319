"""Index scores of many tokens, and the choice of the best rows for each, beside their references."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels.cases.base import Case, Forms, Pairs, normal
from ds4mlx.custom_kernels.cases.index import FLASH, RATIO, place_of, several, taken
from ds4mlx.custom_kernels.layer import chunk_scores, index_select
from ds4mlx.custom_kernels.layer.row_layout import Form


def operands(
    sizes: tuple[int, int], start: int, length: int, form: Form, dtype: mx.Dtype
) -> tuple[Any, ...]:
    """Queries, weights, rows, the first position and the form; sizes: heads and channels."""
    heads, width = sizes
    q, rows = (
        normal((length, heads, width), dtype, 1),
        normal(((start + length) // RATIO, width), dtype, 2),
    )
    if form.layout.kind == "index":
        q = form.unpack(form.pack(q)).astype(dtype)
    return q, normal((length, heads), mx.float32, 3), form.pack(rows), start, form


def compare(
    sizes: tuple[int, int],
    start: int,
    length: int,
    coded: bool,
    dtype: mx.Dtype,
    forms: Forms,
    many: int = chunk_scores.MANY,
) -> Pairs:
    """The scores of rows that are seen; and which are seen."""
    _, form = forms(128, sizes[1], 64, dtype, coded)
    q, weights, rows, *_ = operands(sizes, start, length, form, dtype)
    got = chunk_scores.by_kernel(q, weights, rows, start, form.layout, many)
    want = chunk_scores.plain(q, weights, rows, start, form)
    seen = want > -mx.inf
    alike = ((got > -mx.inf) == seen).astype(mx.float32)
    return [(mx.where(seen, got, 0), mx.where(seen, want, 0)), (alike, mx.ones_like(alike))]


def select(values: mx.array, visible: int, topk: int, each: int = 16) -> Pairs:
    """Where the choice for each of some tokens, scores (L, R), is as good as NumPy's: all ones.

    visible: rows that the first token sees; it is the last of four that see so many.
    """
    place = place_of(RATIO * visible + RATIO - 1)
    chosen, pairs = index_select.by_kernel(values, place, topk, RATIO, each), []
    for token, (own, found) in enumerate(zip(values, chosen, strict=True)):
        seen = own[: min(visible + 1 + token // RATIO, len(own))]
        best = np.argsort(-np.array(seen), kind="stable")[:topk]
        want = mx.array(np.pad(best, (0, topk - len(best)), constant_values=-1))
        equal = taken(seen, found) == taken(seen, want)
        pairs.append((mx.array(equal.astype(np.float32)), mx.ones((topk,))))
    return pairs


def small(forms: Forms) -> Iterator[Case]:
    """Few rows and many, some of them not seen by some tokens or by all; odd heads and widths."""
    bf16, f32 = mx.bfloat16, mx.float32
    for dtype, coded, sizes, start, length, many in (
        (bf16, True, (4, 32), 37, 5, 2),
        (bf16, True, (21, 128), 611, 3, 64),
        (f32, True, (2, 64), 1300, 4, 3),
        (bf16, False, (17, 96), 600, 2, 64),
        (bf16, False, (3, 48), 0, 41, 7),
        (f32, False, (5, 16), 590, 6, 4),
        (f32, False, (18, 128), 37, 5, 64),
        (f32, False, (2, 64), 0, 9, 64),
    ):
        yield _case(sizes, start, length, coded, dtype, forms, many)
    yield _select("normal", normal((6, 700), f32, 7), 600, 64)
    yield _select("few", normal((9, 40), f32, 7), 29, 30)
    yield _select("few scores, by slices", several(15_000, 8, 7).reshape(5, 3000), 2900, 64, 1)


def wide(forms: Forms) -> Iterator[Case]:
    """Flash's sizes."""
    yield _case(FLASH[:2], 2100, 2, True, mx.bfloat16, forms)
    yield _case(FLASH[:2], 130, 9, False, mx.bfloat16, forms, 4)
    yield _case(FLASH[:2], 130, 3, True, mx.float32, forms)
    yield _select("normal", normal((3, 1500), mx.float32, 7), 1400, 512)


def _case(
    sizes: tuple[int, int],
    start: int,
    length: int,
    coded: bool,
    dtype: mx.Dtype,
    forms: Forms,
    many: int = chunk_scores.MANY,
) -> Case:
    name = f"chunk_scores {sizes}, {'coded' if coded else 'plain'}, {length} from {start} by {many}"
    return Case(name, dtype, partial(compare, sizes, start, length, coded, dtype, forms, many))


def _select(name: str, values: mx.array, visible: int, topk: int, each: int = 16) -> Case:
    title = f"index_select of many tokens, {name}, {topk} of {visible}"
    return Case(title, mx.float32, partial(select, values, visible, topk, each))


Timed = tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]


def timed(
    forms: Forms, shapes: tuple[tuple[int, int], ...] = ((8192, 512), (32_768, 2048))
) -> Iterator[Timed]:
    """At Flash's sizes, (start, tokens): (title, call(i, x), x, bytes of the scores)."""
    _, form = forms(512, 128, 64, mx.bfloat16, True)
    for start, length in shapes:
        q, weights, rows, *_ = operands(FLASH[:2], start, length, form, mx.bfloat16)
        values = normal((length, len(rows)), mx.float32, 4)
        mx.eval(q, weights, rows, values)

        def score(_, x, weights=weights, rows=rows, start=start):
            return chunk_scores.by_kernel(x, weights, rows, start, form.layout)

        def choose(_, x, start=start):
            return index_select.by_kernel(x, place_of(start), 512, RATIO)

        yield f"scores of {len(rows)} rows for {length} tokens", score, q, values.nbytes
        yield f"the best 512 of {len(rows)} for {length} tokens", choose, values, values.nbytes
