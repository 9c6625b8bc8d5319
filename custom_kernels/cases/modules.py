"""Every kernel beside its reference in MLX operations: what is compared, at which shapes.

A case computes (what the kernel gave, what it should give, float32). The tests run them on the CPU
executor or on Metal; benchmarks/kernel_equality.py runs the same, and larger ones, on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels import read_speed
from ds4mlx.custom_kernels.cases.base import Case, Pairs, normal
from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.layer import hyper_post, router
from ds4mlx.custom_kernels.products import (
    expert_tiles,
    experts_down,
    experts_down_sorted,
    experts_fragments,
    experts_up,
    experts_up_sorted,
)
from ds4mlx.custom_kernels.products import experts as routed
from ds4mlx.custom_kernels.random_weights import random_planes, random_words
from ds4mlx.formats import FORMATS

UP, DOWN = ("iq2_xxs", "q2_k", "q4_k", "mxfp4"), ("q2_k", "q4_k", "mxfp4")
LIMIT = 0.7  # low, so that many values are clamped


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer's experts, and the tokens that choose among all but the last of them."""

    experts: int
    hidden: int
    width: int
    tokens: int
    topk: int

    def tall(self, dtype: mx.Dtype) -> int:
        """Rows of a tile of the sorted tokens."""
        return routed.tall(dtype, self.tokens * self.topk, self.experts)

    def __str__(self) -> str:
        sizes = f"{self.experts}x{self.hidden}x{self.width}"
        return f"{sizes}, {self.tokens} tokens of {self.topk}"


# Few rows of wide matrices keep the tests fast; odd numbers of rows leave a threadgroup half full.
TINY = Shape(5, 256, 256, 3, 2)
ODD_UP, ODD_DOWN = Shape(5, 21, 2304, 3, 2), Shape(5, 1280, 21, 3, 3)
FLASH_UP, FLASH_DOWN = Shape(3, 19, 4096, 1, 2), Shape(8, 2048, 21, 1, 6)
MANY_UP, MANY_DOWN = Shape(4, 90, 256, 110, 2), Shape(4, 256, 90, 110, 2)
# Fewer rows an expert, so that tiles are less tall: of the first the last tile of an expert has few.
LESS_UP, LESS_DOWN = Shape(7, 90, 256, 80, 2), Shape(7, 256, 90, 80, 2)
MIDDLE_UP, MIDDLE_DOWN = Shape(4, 90, 256, 65, 2), Shape(4, 256, 90, 65, 2)
THIRDS_UP, THIRDS_DOWN = Shape(12, 2, 384, 9, 3), Shape(2, 384, 130, 9, 3)
WIDE_UP, WIDE_DOWN = Shape(3, 34, 4096, 9, 2), Shape(8, 2048, 34, 9, 6)
PRO_UP, PRO_DOWN = Shape(3, 17, 7168, 2, 2), Shape(8, 3072, 18, 1, 6)


def chosen(shape: Shape, seed: int) -> tuple[mx.array, mx.array]:
    """Experts int32 (N, k), some of them twice in a token, and weights; the last has no token."""
    rng = np.random.default_rng(seed)
    experts = rng.integers(0, shape.experts - 1, (shape.tokens, shape.topk))
    weights = rng.random((shape.tokens, shape.topk)).astype(np.float32)
    return mx.array(experts.astype(np.int32)), mx.array(weights)


def up(
    format: str, dtype: mx.Dtype, shape: Shape, scale: float = 1.0, eight: bool = False
) -> Pairs:
    sizes = shape.experts, shape.hidden, shape.width
    gate, rise = random_planes(format, sizes, 1), random_planes(format, sizes, 2)
    experts, weights = chosen(shape, 3)
    x = normal((shape.tokens, shape.width), dtype, 4, scale)
    limit = LIMIT if scale == 1 else 1e30  # the clamp would make rounding errors look large
    got = experts_up.experts_up(format, gate, rise, x, experts, weights, limit, eight)
    x = staging.as_bytes(x) if eight else x
    operands = gate, rise, x, experts, weights, limit
    return [(got, experts_up.reference(FORMATS[format], *operands))]


def down(
    format: str, dtype: mx.Dtype, shape: Shape, scale: float = 1.0, eight: bool = False
) -> Pairs:
    planes = random_planes(format, (shape.experts, shape.width, shape.hidden), 1)
    experts, _ = chosen(shape, 3)
    hidden = normal((experts.size, shape.hidden), dtype, 4, scale)
    got = experts_down.experts_down(format, planes, hidden, experts, eight)
    hidden = staging.as_bytes(hidden) if eight else hidden
    return [(got, experts_down.reference(FORMATS[format], planes, hidden, experts))]


def sorted_pairs(experts: mx.array, count: int, tall: int) -> tuple[mx.array, mx.array]:
    """Order of the pairs by expert, and the tiles of at most `tall` rows that they are cut into."""
    order = mx.argsort(experts.flatten())
    return order, expert_tiles.expert_tiles(experts.flatten()[order], count, tall)


def up_sorted(format: str, dtype: mx.Dtype, shape: Shape) -> Pairs:
    sizes = shape.experts, shape.hidden, shape.width
    gate, rise = random_planes(format, sizes, 1), random_planes(format, sizes, 2)
    experts, weights = chosen(shape, 3)
    x = normal((shape.tokens, shape.width), dtype, 4)
    order, jobs = sorted_pairs(experts, shape.experts, tall := shape.tall(dtype))
    sides = x, order, jobs, weights, LIMIT
    if dtype == mx.float32:
        got = experts_up_sorted.experts_up_sorted(format, gate, rise, *sides)
    else:
        got = experts_fragments.experts_up_fragments(format, gate, rise, *sides, tall)
    operands = gate, rise, x, experts, weights, LIMIT
    return [(got, experts_up.reference(FORMATS[format], *operands)[order])]


def down_sorted(format: str, dtype: mx.Dtype, shape: Shape) -> Pairs:
    planes = random_planes(format, (shape.experts, shape.width, shape.hidden), 1)
    experts, _ = chosen(shape, 3)
    hidden = normal((experts.size, shape.hidden), dtype, 4)
    order, jobs = sorted_pairs(experts, shape.experts, tall := shape.tall(dtype))
    sides = hidden[order], order, jobs, shape.topk
    if dtype == mx.float32:
        got = experts_down_sorted.experts_down_sorted(format, planes, *sides)
    else:
        got = experts_fragments.experts_down_fragments(format, planes, *sides, tall)
    return [(got, experts_down.reference(FORMATS[format], planes, hidden, experts))]


def runs(counts: list[int], tall: int) -> Pairs:
    """The tiles of runs of so many rows, against the same in NumPy."""
    experts = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    starts = np.cumsum([0, *counts])
    want = [
        (e, starts[e] + row, min(count - row, tall), 0)
        for e, count in enumerate(counts)
        for row in range(0, count, tall)
    ]
    most = expert_tiles.most_tiles(experts.size, len(counts), tall)
    padded = np.zeros((most, 4), np.float32)
    padded[: len(want)] = want
    return [(expert_tiles.expert_tiles(mx.array(experts), len(counts), tall), mx.array(padded))]


def route(dtype: mx.Dtype, experts: int, width: int, tokens: int, hashed: bool) -> Pairs:
    x, weight = normal((tokens, width), dtype, 1), normal((experts, width), mx.bfloat16, 2, 0.05)
    if hashed:
        rng = np.random.default_rng(0)
        table = np.stack([rng.permutation(experts)[:6] for _ in range(50)]).astype(np.int32)
        options: dict[str, Any] = {"table": mx.array(table), "ids": mx.arange(7, 7 + tokens)}
    else:
        options = {"bias": normal((experts,), mx.float32, 3)}
    sides = []
    for side in (router.by_kernel, router.plain):
        found, weights = side(x, weight, 1.5, 6, **options)
        order = mx.argsort(found, axis=-1)  # which comes first is no part of the answer
        sides.append([mx.take_along_axis(a, order, axis=-1) for a in (found, weights)])
    return [(got, want.astype(mx.float32)) for got, want in zip(*sides, strict=True)]


def post(dtype: mx.Dtype, width: int, tokens: int) -> Pairs:
    streams, out = normal((tokens, 4, width), dtype, 1), normal((tokens, width), dtype, 2)
    weights, comb = normal((tokens, 4), mx.float32, 3), normal((tokens, 4, 4), mx.float32, 4)
    got = hyper_post.by_kernel(streams, out, weights, comb)
    return [(got, hyper_post.plain(streams.astype(mx.float32), out, weights, comb))]


def reading(words: int) -> Pairs:
    """The exclusive or of what was read, as two halves that float32 holds exactly."""
    array = random_words((words,), 1)
    sides = [read_speed.reference(a) for a in (read_speed.read_all(array), array)]
    got, want = (mx.concatenate([a >> 16, a & 0xFFFF]).astype(mx.float32) for a in sides)
    return [(got, want)]


def small() -> Iterator[Case]:
    """Every kernel, both types, at a tiny model's widths and odd counts."""
    for dtype in (mx.float32, mx.bfloat16):
        yield from _experts(dtype)
        yield from _others(dtype)
    yield Case("read_speed", mx.float32, lambda: reading(16 * 256 * 4096))
    for tall, counts in ((64, [3, 0, 64, 65, 0]), (64, [0, 0, 1]), (128, [130, 1, 0, 128])):
        call = partial(runs, counts, tall)
        yield Case(f"expert_tiles of {tall}, {counts}", mx.float32, call)


def _experts(dtype: mx.Dtype) -> Iterator[Case]:
    for format in UP:
        yield _case(up, "experts_up", format, dtype, ODD_UP)
        yield _case(up_sorted, "experts_up_sorted", format, dtype, MANY_UP)
    for format in DOWN:
        yield _case(down, "experts_down", format, dtype, ODD_DOWN)
        yield _case(down_sorted, "experts_down_sorted", format, dtype, MANY_DOWN)
    if dtype == mx.bfloat16:
        for up_shape, down_shape in ((LESS_UP, LESS_DOWN), (MIDDLE_UP, MIDDLE_DOWN)):
            for each in UP:
                yield _case(up_sorted, "experts_up_sorted", each, dtype, up_shape)
            for each in DOWN:
                yield _case(down_sorted, "experts_down_sorted", each, dtype, down_shape)
        yield _case(up_sorted, "experts_up_sorted", "mxfp4", dtype, THIRDS_UP)
        yield _case(down_sorted, "experts_down_sorted", "mxfp4", dtype, THIRDS_DOWN)


def _others(dtype: mx.Dtype) -> Iterator[Case]:
    yield Case("router 37x264", dtype, lambda: route(dtype, 37, 264, 2, False))
    yield Case("router hashed 16x264", dtype, lambda: route(dtype, 16, 264, 3, True))
    yield Case("hyper_post 288", dtype, lambda: post(dtype, 288, 2))


def _case(compute, name: str, format: str, dtype: mx.Dtype, shape: Shape, *scale: float) -> Case:
    note = "".join(f", activations of {each:g}" for each in scale)
    call = partial(compute, format, dtype, shape, *scale)
    return Case(f"{name} {format} {shape}{note}", dtype, call)


def wide() -> Iterator[Case]:
    """The widths of Flash and Pro, few rows; activations far from 1, and as bytes."""
    for format in ("iq2_xxs", "q2_k", "q4_k"):
        call = partial(up, format, mx.bfloat16, ODD_UP, eight=True)
        yield Case(f"experts_up {format} {ODD_UP}, bytes", mx.bfloat16, call)
    for format in ("q2_k", "q4_k"):
        call = partial(down, format, mx.bfloat16, ODD_DOWN, 1e5, eight=True)
        yield Case(f"experts_down {format} {ODD_DOWN}, bytes", mx.bfloat16, call)
    for shape in (FLASH_UP, PRO_UP):
        yield from (_case(up, "experts_up", s, mx.bfloat16, shape) for s in UP)
    for shape in (FLASH_DOWN, PRO_DOWN):
        yield from (_case(down, "experts_down", s, mx.bfloat16, shape) for s in DOWN)
    yield _case(up_sorted, "experts_up_sorted", "iq2_xxs", mx.bfloat16, WIDE_UP)
    yield _case(down_sorted, "experts_down_sorted", "q2_k", mx.bfloat16, WIDE_DOWN)
    yield _case(up, "experts_up", "iq2_xxs", mx.float32, PRO_UP)
    yield _case(down, "experts_down", "q2_k", mx.float32, PRO_DOWN)
    yield Case("router 256x7168", mx.bfloat16, lambda: route(mx.bfloat16, 256, 7168, 1, False))
    for format, scale in (("iq2_xxs", 1e15), ("q4_k", 1e-12), ("mxfp4", 3e4)):
        yield _case(up, "experts_up", format, mx.bfloat16, TINY, scale)
    for format, scale in (("q2_k", 1e25), ("q4_k", 1e-25), ("mxfp4", 1e30)):
        yield _case(down, "experts_down", format, mx.bfloat16, TINY, scale)
