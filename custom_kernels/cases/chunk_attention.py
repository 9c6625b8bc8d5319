"""Core attention of many tokens by the kernel beside plain operations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.cases.attention import FLASH, ODD, TINY, Sizes
from ds4mlx.custom_kernels.cases.base import Case, Forms, Pairs, normal
from ds4mlx.custom_kernels.layer import chunk_attention
from ds4mlx.custom_kernels.layer.row_layout import Form


@dataclass(frozen=True)
class Chunk:
    """The first token's position, how many tokens follow on each other, and how many rows each chooses."""

    start: int
    length: int
    chosen: int = 0


def operands(
    ratio: int, sizes: Sizes, chunk: Chunk, form: Form, dtype: mx.Dtype
) -> tuple[list[Any], dict[str, Any]]:
    """What `chunk_attention` is given: arrays, and options. Some names are of rows not seen, or of none."""
    low, end = max(0, chunk.start - sizes.before), chunk.start + chunk.length
    window = form.pack(normal((end - low, sizes.width), dtype, 1))
    count = end // ratio if ratio else 0
    rows = form.pack(normal((count, sizes.width), dtype, 2)) if count else window[:0]
    chosen = None
    if chunk.chosen:
        ranks = mx.random.uniform(
            shape=(chunk.length, max(count, chunk.chosen)), key=mx.random.key(4)
        )
        chosen = mx.argsort(ranks, axis=1)[:, : chunk.chosen].astype(mx.int32)
        chosen = mx.where(chosen % 7 == 3, -1, mx.where(chosen < count, chosen, count + 5))
    turns = mx.random.uniform(-3, 3, (chunk.length, sizes.rope // 2), key=mx.random.key(9))
    q = normal((chunk.length, sizes.heads, sizes.width), dtype, 5)
    sink = normal((sizes.heads,), mx.float32, 6, 2.0)
    options = {"start": chunk.start, "ratio": ratio, "before": sizes.before, "form": form}
    return [q, sink, window, rows, chosen, (mx.cos(turns), mx.sin(turns))], options


def compare(
    ratio: int, sizes: Sizes, chunk: Chunk, coded: bool, dtype: mx.Dtype, forms: Forms
) -> Pairs:
    """What the kernel gave, and what plain operations give."""
    form, _ = forms(sizes.width, 128, sizes.rope, dtype, coded)
    arrays, options = operands(ratio, sizes, chunk, form, dtype)
    got = chunk_attention.by_kernel(*arrays, **options)
    if chunk.chosen:  # the plain side takes every name for a row
        arrays[4] = mx.where(arrays[4] < len(arrays[3]), arrays[4], -1)
    return [(got, chunk_attention.plain(*arrays, **options))]


def small(forms: Forms) -> Iterator[Case]:
    """Windows alone, with all rows and with chosen ones, wherever a chunk begins."""
    many = Sizes(37, 128, 36, 20)
    for number, (ratio, sizes, chunk) in enumerate(
        (
            (0, TINY, Chunk(0, 3)),
            (0, ODD, Chunk(0, 9)),
            (0, TINY, Chunk(300, 2)),
            (4, ODD, Chunk(2, 7)),
            (4, many, Chunk(201, 3)),
            (4, ODD, Chunk(201, 5, 30)),
            (4, many, Chunk(40, 1, 5)),
            (4, TINY, Chunk(4001, 2, 100)),
            (128, TINY, Chunk(126, 4)),
            (128, ODD, Chunk(2563, 2)),
        )
    ):
        dtype = mx.float32 if number % 2 else mx.bfloat16
        yield _case(ratio, sizes, chunk, number % 3 < 2, dtype, forms)
    yield _case(4, many, Chunk(40, 3, 12), True, mx.float32, forms)
    yield _case(4, TINY, Chunk(201, 3), False, mx.bfloat16, forms)


def wide(forms: Forms) -> Iterator[Case]:
    """Flash's sizes: a window with 512 rows chosen, alone, and with few rows."""
    for ratio, chunk in ((4, Chunk(2600, 2, 512)), (0, Chunk(1000, 2)), (128, Chunk(6400, 1))):
        yield _case(ratio, FLASH, chunk, True, mx.bfloat16, forms)
    yield _case(4, Sizes(9, 512, 64), Chunk(2600, 1, 512), True, mx.float32, forms)
    yield _case(128, Sizes(33, 512, 64), Chunk(640, 1), False, mx.bfloat16, forms)


def _case(
    ratio: int, sizes: Sizes, chunk: Chunk, coded: bool, dtype: mx.Dtype, forms: Forms
) -> Case:
    rounding = "coded" if coded else "plain"
    call = partial(compare, ratio, sizes, chunk, coded, dtype, forms)
    return Case(f"chunk_attention {ratio}, {sizes}, {rounding}, {chunk}", dtype, call)


Timed = tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]


def timed(forms: Forms, lengths: tuple[int, ...] = (512, 2048)) -> Iterator[Timed]:
    """At Flash's sizes: (title, call(i, q), q, bytes of the rows that the tokens unpack)."""
    form, _ = forms(FLASH.width, 128, FLASH.rope, mx.bfloat16, True)
    for ratio, start, length, chosen in (
        *((0, 8192, n, 0) for n in lengths),
        *((4, 32_768, n, 512) for n in lengths),
        *((128, 32_768, n, 0) for n in lengths),
    ):
        arrays, options = operands(ratio, FLASH, Chunk(start, length, chosen), form, mx.bfloat16)
        mx.eval(arrays)

        def call(_, q: mx.array, arrays=arrays, options=options) -> mx.array:
            """The heads' outputs, from queries q."""
            return chunk_attention.by_kernel(q, *arrays[1:], **options)

        each = 128 + (chosen or (start // ratio if ratio else 0))
        title = f"attention of ratio {ratio} of {length} tokens over {each} rows each"
        yield title, call, arrays[0], length * each * form.layout.elements * 4
