"""The last product of a sublayer and what follows in one launch beside both, one after the other."""

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from ds4mlx.custom_kernels.cases.base import Case, Pairs, normal
from ds4mlx.custom_kernels.cases.dense_matvec import CACHE, KINDS
from ds4mlx.custom_kernels.cases.hyper import F32, fn_of, mixed, partials
from ds4mlx.custom_kernels.layer import hyper_out
from ds4mlx.custom_kernels.layer.after import After, beside
from ds4mlx.custom_kernels.layer.carried import together
from ds4mlx.custom_kernels.layer.hyper_post import plain as merged
from ds4mlx.custom_kernels.layer.hyper_pre import MIXES, STREAMS
from ds4mlx.custom_kernels.products import dense_hyper, dense_matvec
from ds4mlx.custom_kernels.random_weights import random_planes


def after(
    dtype: mx.Dtype, kind: str, width: int, columns: int, rows: int = MIXES, scale: float = 1.0
) -> Pairs:
    """New streams; their mixes, of the streams as the kernel rounded them."""
    planes = random_planes(kind, (width, columns), 3)
    heads, streams = (
        normal(shape, dtype, i, scale)
        for i, shape in enumerate([(1, columns), (1, STREAMS, width)])
    )
    weights, fn = After(normal((1, 4), F32, 6), normal((1, 4, 4), F32, 7)), fn_of(rows, width)
    lying = beside(normal((1, 9), F32, 8), weights)
    before = together(streams, partials(streams, fn))
    new = dense_hyper.by_kernel(kind, planes, heads, before, lying, fn)
    out = dense_matvec.plain([(kind, planes)], heads)
    want = merged(streams.astype(F32), out, *weights)
    return [(new.streams, want), *mixed(new.partial, new.streams, fn)]


def _case(dtype: mx.Dtype, kind: str, width: int, columns: int, **more) -> Case:
    notes = "".join(f", {name} {value:g}" for name, value in more.items())
    call = partial(after, dtype, kind, width, columns, **more)
    return Case(f"dense_hyper {kind} {width} by {columns}{notes}", dtype, call)


def small() -> Iterator[Case]:
    """Every format; a width that leaves lanes idle, and columns that do."""
    for dtype in (F32, mx.bfloat16):
        for kind in KINDS:
            yield _case(dtype, kind, 40, 352)
        yield _case(dtype, "bf16", 64, 64, rows=STREAMS)


def wide() -> Iterator[Case]:
    """Columns of Flash; values far from 1."""
    for dtype in (F32, mx.bfloat16):
        for kind in KINDS:
            yield _case(dtype, kind, 96, 8192)
    yield _case(mx.bfloat16, "mxfp8", 7168, 64)
    for scale in (1e-12, 1e15):
        yield _case(mx.bfloat16, "mxfp8", 96, 96, scale=scale)


Timed = tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]


def timed(width: int = 4096, columns: int = 8192) -> Iterator[Timed]:
    """At Flash's sizes: (title, call(i, x), x, bytes read); call depends on x, i turns the weights."""
    size = width * columns + width * columns // 32
    copies = [random_planes("mxfp8", (width, columns), i) for i in range(CACHE // size + 1)]
    heads, streams = normal((1, columns), mx.bfloat16, 1), normal((1, 4, width), mx.bfloat16, 2)
    weights, fn = After(normal((1, 4), F32, 6), normal((1, 4, 4), F32, 7)), fn_of(MIXES, width)
    lying = beside(normal((1, 9), F32, 8), weights)
    before = together(streams, hyper_out.mix_by_kernel(streams, fn))
    mx.eval(copies, heads, before, lying.array, fn)

    def call(i: int, x: mx.array) -> mx.array:
        sides = x, before, lying, fn
        return dense_hyper.by_kernel("mxfp8", copies[i % len(copies)], *sides).streams

    yield "wo_b with what follows", call, heads, size
