"""The index kernels beside their references: the scores of rows, and the choice of the best."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels.cases.base import Case, Pairs, normal
from ds4mlx.custom_kernels.layer import index_scores, index_select
from ds4mlx.custom_kernels.layer.buffers import Grown, joined
from ds4mlx.custom_kernels.layer.plain import rotate
from ds4mlx.custom_kernels.layer.row_layout import RowLayout
from ds4mlx.custom_kernels.products.columns import Columns, whole
from ds4mlx.custom_kernels.random_weights import random_words

RATIO, F32 = 4, mx.float32


def place_of(position: int, settled: int = 0, number: int = 0) -> mx.array:
    """What is told of a token at a position, where so many index rows are settled; its number."""
    return mx.array([position, 0, settled, 0, number, 0, 0, 0], dtype=mx.int32)


def angles_of(rope: int, position: int) -> mx.array:
    """Four tables of cos and sin, each of other frequencies, float32 (4, 2, rope / 2)."""
    steps = np.outer(position - np.arange(4.0), 10.0 ** -np.linspace(0, 4, rope // 2))
    return mx.array(np.stack([np.cos(steps), np.sin(steps)], axis=1).astype(np.float32))


def grown(full: mx.array, tail: mx.array) -> Grown:
    """Rows whose tail lies behind another, as in a state."""
    return Grown(full, joined([mx.full((3, 2), mx.nan), tail])[1])


def rows_of(layout: RowLayout, shape: tuple[int, int]) -> list[mx.array]:
    """Random rows of a layout: `shape` rows in full and tail."""
    if layout.kind == "plain":
        return [normal((n, layout.width), layout.dtype, 7 + i) for i, n in enumerate(shape)]
    parts = []
    for seed, count in enumerate(shape):
        words = random_words((count, layout.elements), 11 + seed)
        codes = layout.width // 8
        powers = (words[:, codes:] & 0x03030303) + 0x7C7C7C7C  # near 1
        parts.append(mx.concatenate([words[:, :codes], powers], axis=1))
    return parts


def values_of(words: mx.array, width: int) -> mx.array:
    """The float32 values of rows of E2M1 codes, and of exponents of 32 channels each."""
    data = np.array(words).view(np.uint8)
    codes = np.stack([data[:, : width // 2] & 15, data[:, : width // 2] >> 4], -1).reshape(
        -1, width
    )
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7]
    powers = 2.0 ** (data[:, width // 2 : width // 2 + width // 32].astype(np.float32) - 127)
    signed = np.where(codes & 8, -sizes, sizes).astype(np.float32)
    return mx.array(signed * np.repeat(powers, 32, axis=1).astype(np.float32))


def spread(turned: mx.array, dtype: mx.Dtype) -> mx.array:
    """Queries (heads, width), float32, Hadamard-transformed as on a GPU and rounded to FP4."""
    heads, width = turned.shape
    steps = [2**bit for bit in range(0, width.bit_length() - 1, 4)]
    for step in steps:  # 16 values that lie `step` apart, rounded after each step
        many = min(16, width // step)
        y = turned.reshape(heads, -1, many, step).swapaxes(2, 3)
        y = mx.hadamard_transform(y, 1.0).swapaxes(2, 3).reshape(heads, width)
        turned = y.astype(dtype).astype(mx.float32)
    x = np.array((turned * mx.array(width**-0.5)).astype(dtype).astype(mx.float32))
    groups = x.reshape(heads, -1, 32)
    most = np.maximum(np.abs(groups).max(-1, keepdims=True), np.float32(6 * 2.0**-126))
    scale = 2 ** np.ceil(np.log2(most.astype(np.float64) / 6))
    size = np.abs(groups) / scale
    step = np.where(size < 2, 0.5, np.where(size < 4, 1, 2))
    rounded = np.sign(groups) * np.round(size / step) * step * scale
    return mx.array(rounded.reshape(heads, width).astype(np.float32))


def beside(rows: Sequence[mx.array], before: int, behind: int) -> Columns:
    """Arrays (n,) as products of all tokens but the first, with others beside them."""
    padded = [mx.pad(row, (before, behind), constant_values=mx.nan) for row in rows]
    return Columns(mx.stack([mx.full(padded[0].shape, mx.nan), *padded]), before, len(rows[0]))


def scores_reference(
    q: mx.array,
    weights: mx.array,
    rows: Grown,
    place: mx.array,
    angles: mx.array,
    *,
    heads: int,
    layout: RowLayout,
    dtype: mx.Dtype,
) -> mx.array:
    """The scores of the visible rows, in float32."""
    width, settled = layout.width, int(place[2])
    turned = rotate(q.astype(dtype).reshape(1, heads, width), (angles[1, :1], angles[1, 1:]))[0]
    turned = turned.astype(mx.float32)
    keys = mx.concatenate([rows.full[:settled], rows.tail.value])[: (int(place[0]) + 1) // RATIO]
    if layout.kind == "index":
        turned, keys = spread(turned, dtype), values_of(keys, width)
    hits = mx.maximum(turned @ keys.astype(mx.float32).T, 0)
    return (weights * (width * heads) ** -0.5) @ hits


def scores(
    dtype: mx.Dtype,
    kind: str,
    sizes: tuple[int, int, int],
    shape: tuple[int, int],
    position: int,
    settled: int,
    scale: float = 1.0,
    most: int = index_scores.MOST_GROUPS,
    others: int = 0,
) -> Pairs:
    """sizes: (heads, width, rope); shape: the rows of full and tail. Beside the sequence so many others
    that have fewer rows."""
    heads, width, rope = sizes
    coded = RowLayout("index", width, width // 8 + -(-width // 128), mx.uint32)
    layout = coded if kind == "index" else RowLayout("plain", width, width, dtype)
    options: Any = {"heads": heads, "layout": layout, "dtype": dtype}
    each = []
    for number in range(others + 1):
        less = 4 * number
        at, full = position - 4 * less, (shape[0] - less, shape[1])
        q, weights = normal((heads * width,), F32, 1 + number, scale), normal((heads,), F32, 2)
        place = place_of(at, settled - less, 1 + number)
        rows = grown(*(mx.roll(array, number, 0) for array in rows_of(layout, full)))
        each.append((q, weights, rows, place, angles_of(rope, at)))
    queries, weights, rows, places, turns = map(list, zip(*each, strict=True))
    angles = mx.stack([mx.full(turns[0].shape, mx.nan), *turns])
    told = beside(queries, 8, 4), beside(weights, 20, 0), rows, mx.stack(places), angles
    got = index_scores.by_kernel(*told, **options, most=most)
    pairs: Pairs = []
    for found, own in zip(got, each, strict=True):
        want = scores_reference(*own, **options)
        unseen = (found[len(want) :] == -mx.inf).astype(mx.float32)
        pairs += [(found[: len(want)], want), (unseen, mx.ones_like(unseen))]
    return pairs


def taken(scores: mx.array, chosen: mx.array) -> np.ndarray:
    """The scores that a choice took, in order; 1e300 for no row, a row named twice, or none of theirs."""
    rows, values = np.array(chosen), np.array(scores, np.float64)
    good = (rows >= 0) & (rows < len(values))
    once = np.zeros(len(rows), bool)
    once[np.unique(rows, return_index=True)[1]] = True
    return np.sort(np.where(good & once, values[np.where(good, rows, 0)], 1e300))


def select(values: mx.array, visible: int, topk: int, each: int = 16) -> Pairs:
    """Where the kernel's choice among the first `visible` scores is as good as NumPy's: all ones."""
    place = place_of(RATIO * visible - 1 + visible % RATIO)
    beside = mx.stack([values[::-1], values])
    places = mx.stack([place_of(3), place])
    chosen = index_select.by_kernel(beside, places, topk, RATIO, each)[1]
    best = np.argsort(-np.array(values[:visible]), kind="stable")[:topk]
    want = mx.array(np.pad(best, (0, topk - len(best)), constant_values=-1))
    equal = taken(values[:visible], chosen) == taken(values[:visible], want)
    return [(mx.array(equal.astype(np.float32)), mx.ones((topk,)))]


def several(count: int, seed: int, kinds: int) -> mx.array:
    """Scores of which only so many differ, 0 among them."""
    words = random_words((count,), seed) % kinds
    return (words.astype(mx.float32) - kinds // 2) * 0.37


FLASH, TALKER, TINY = (64, 128, 64), (2, 64, 16), (4, 32, 8)


def _case(kind: str, dtype: mx.Dtype, sizes, shape, position: int, settled: int, **more) -> Case:
    name = f"index_scores {kind} {sizes}, {settled} of {shape} rows at {position} {more}"
    return Case(name, dtype, partial(scores, dtype, kind, sizes, shape, position, settled, **more))


def small() -> Iterator[Case]:
    """Both kernels, both layouts and types, at a tiny model's sizes."""
    for dtype in (mx.float32, mx.bfloat16):
        for kind in ("index", "plain"):
            yield _case(kind, dtype, TINY, (16, 40), 4 * 37 + 2, 16)
            yield _case(kind, dtype, TALKER, (96, 8), 4 * 71, 67)
            yield _case(kind, dtype, TALKER, (250, 8), 4 * 251, 245, most=2)
        yield _case("index", dtype, TALKER, (96, 8), 4 * 71, 67, others=1)
    yield _case("index", mx.bfloat16, TINY, (96, 8), 4 * 71, 67, others=2)
    yield _case("index", mx.bfloat16, TINY, (96, 8), 4 * 71, 67, others=7)
    yield _case("plain", mx.bfloat16, TINY, (96, 8), 4 * 71, 67, others=1)
    yield _case("plain", mx.bfloat16, TINY, (96, 8), 4 * 71, 67, others=3)
    yield _case("plain", mx.float32, (3, 40, 8), (8, 8), 43, 3)
    yield Case("index_select 5 of 40", mx.float32, lambda: select(normal((64,), F32, 1), 40, 5))
    yield Case("index_select 64 of 60", mx.float32, lambda: select(normal((64,), F32, 1), 60, 64))


def wide() -> Iterator[Case]:
    """Flash's sizes: few rows and many, settled anywhere, ties, several slices."""
    for kind, dtype in (("index", mx.bfloat16), ("index", F32), ("plain", mx.bfloat16)):
        yield _case(kind, dtype, FLASH, (600, 64), 4 * 610 + 1, 580)
    yield _case("index", mx.bfloat16, FLASH, (600, 64), 4 * 40, 0)
    yield _case("index", mx.bfloat16, FLASH, (900, 64), 4 * 910, 880, most=1)
    yield _case("index", mx.bfloat16, FLASH, (900, 64), 4 * 910, 880, most=9)
    yield _case("plain", F32, FLASH, (40, 40), 4 * 70 + 2, 33)
    yield _case("index", mx.bfloat16, (4, 32, 32), (20000, 8), 4 * 19999, 19995)
    yield _case("index", mx.bfloat16, (4, 256, 64), (40, 40), 4 * 70, 35)
    yield _case("index", mx.bfloat16, FLASH, (40, 40), 4 * 70, 35, scale=1e30)
    for visible in (507, 511, 512, 513, 600, 3000):
        yield _select(f"normal, 512 of {visible}", normal((3100,), F32, visible), visible)
    yield _select("512 of 20000 near 1", 1 + 1e-4 * normal((20000,), F32, 3), 20000)
    yield _select("512 of 5000 by slices of 1024", normal((5000,), F32, 4), 4900, each=1)
    yield _select("512 of 400 by slices of 1024", normal((5000,), F32, 4), 400, each=1)
    for kinds in (1, 2, 7):
        yield _select(f"512 of 3000, {kinds} scores", several(3000, 5, kinds), 3000)
        yield _select(f"by slices, {kinds} scores", several(3000, 5, kinds), 2999, each=1)
    yield _select("512 of zeros and -0", mx.zeros((2000,)) * normal((2000,), F32, 6), 2000)
    extremes = mx.array([-np.inf, np.inf, -3e38, 3e38, 1e-45, -1e-45, 0, -0.0] * 100, F32)
    yield _select("512 of extremes", extremes, 790)


def _select(name: str, values: mx.array, visible: int, topk: int = 512, each: int = 16) -> Case:
    return Case(f"index_select {name}", F32, partial(select, values, visible, topk, each))


Timed = tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]


def timed(depths: tuple[int, ...] = (2500, 16384, 262144)) -> Iterator[Timed]:
    """At Flash's sizes and so many rows: (title, call(i, x), x, bytes read); call depends on x."""
    heads, width, rope = FLASH
    layout = RowLayout("index", width, 17, mx.uint32)
    weights, q = whole(normal((1, heads), F32, 2)), normal((1, heads * width), F32, 1)
    for count in depths:
        rows = grown(*rows_of(layout, (count - 100, 256)))
        place = place_of(RATIO * count - 1, count - 100)[None]
        angles = angles_of(rope, RATIO * count - 1)[None]
        values = normal((1, count + 156), F32, 3)
        mx.eval(rows, place, angles, values, weights.array, q)

        def score(_, x, rows=rows, place=place, angles=angles):
            options: Any = {"heads": heads, "layout": layout, "dtype": mx.bfloat16}
            return index_scores.by_kernel(whole(x), weights, [rows], place, angles, **options)

        def choose(_, x, place=place):
            return index_select.by_kernel(x, place, 512, RATIO)

        yield f"index_scores of {count} rows", score, q, count * 68
        yield f"index_select 512 of {count}", choose, values, count * 4
