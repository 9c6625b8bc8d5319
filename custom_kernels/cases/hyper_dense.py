"""The first products of a sublayer in one launch beside what its input and they are, one after the other."""

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from ds4mlx.custom_kernels.cases.base import Case, Pairs, normal
from ds4mlx.custom_kernels.cases.dense_matvec import FLASH, KINDS, Shapes, copies_of
from ds4mlx.custom_kernels.cases.hyper import EPS, F32, fn_of, norm_of, partials
from ds4mlx.custom_kernels.layer import hyper_out
from ds4mlx.custom_kernels.layer.carried import Together, together
from ds4mlx.custom_kernels.layer.hyper_pre import MIXES, STREAMS
from ds4mlx.custom_kernels.layer.hyper_pre import plain as before_sublayer
from ds4mlx.custom_kernels.products import dense_matvec, hyper_dense
from ds4mlx.custom_kernels.products.columns import Inside, side_by_side
from ds4mlx.custom_kernels.random_weights import random_planes

OPTIONS = {"iterations": 20, **EPS}


def products(
    dtype: mx.Dtype, shapes: Shapes, width: int, *, given: bool = False, scale: float = 1.0
) -> Pairs:
    """Matrices (format, rows) times what streams of a type collapse to, in that type."""
    matrices = [(name, random_planes(name, (n, width), i)) for i, (name, n) in enumerate(shapes)]
    streams, fn = normal((1, STREAMS, width), dtype, 4, scale), fn_of(MIXES, width)
    sides = normal((MIXES,), F32, 2), normal((3,), F32, 3), norm_of(width, dtype)
    carried = together(streams, partials(streams, fn))
    got = hyper_dense.by_kernel(matrices, carried, *sides, given=given, **OPTIONS)
    x, post, comb = before_sublayer(streams, fn, *sides, **OPTIONS)
    want, widths = dense_matvec.plain(matrices, x), [n for _, n in shapes]
    both = (side_by_side(array, widths) for array in (got.products, want))
    pairs = [(a.value, b.value) for a, b in zip(*both, strict=True)]
    pairs += [(got.after.post, post), (got.after.comb, comb)]
    return [*pairs, (got.x.value, x)] if isinstance(got.x, Inside) else pairs


def _case(dtype: mx.Dtype, shapes: Shapes, width: int, **options) -> Case:
    sizes = " + ".join(f"{name} {rows}" for name, rows in shapes)
    notes = "".join(f", {name} {value}" for name, value in options.items())
    call = partial(products, dtype, shapes, width, **options)
    return Case(f"hyper_dense {sizes} by {width}{notes}", dtype, call)


def small() -> Iterator[Case]:
    """Every format; odd numbers of rows, a width that leaves lanes idle."""
    for dtype in (F32, mx.bfloat16):
        for kind in KINDS:
            yield _case(dtype, [(kind, 37)], 352)
            yield _case(dtype, [(kind, 17)], 64, given=True)
        mixed = [("mxfp8", 19), ("q8_0", 5), ("bf16", 34), ("f16", 1), ("f32", 3), ("bf16", 2)]
        yield _case(dtype, mixed, 544, given=True)


def wide() -> Iterator[Case]:
    """The widths of Flash and Pro, with matrices side by side as layers have them; streams far from 1."""
    for dtype in (F32, mx.bfloat16):
        for kind in KINDS:
            yield _case(dtype, [(kind, 33)], 4096)
        yield _case(dtype, [("mxfp8", 40), ("mxfp8", 24), ("bf16", 9)], 4096, given=True)
        yield _case(dtype, [("mxfp8", 20), ("bf16", 3)], 7168)
    for scale in (1e-12, 1e15):
        yield _case(mx.bfloat16, [("mxfp8", 20)], 96, scale=scale)


Timed = tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]


def timed(width: int = 4096) -> Iterator[Timed]:
    """At Flash's sizes: (title, call(i, x), x, bytes read); call depends on x, i turns the weights."""
    streams, fn = normal((1, STREAMS, width), mx.bfloat16, 1), fn_of(MIXES, width)
    sides = normal((MIXES,), F32, 2), normal((3,), F32, 3), norm_of(width, mx.bfloat16)
    carried = together(streams, hyper_out.mix_by_kernel(streams, fn)).array
    for title in ("shared w1, w3, router", "wq_a, wkv, compressors"):
        shapes, columns, _ = FLASH[title]
        copies, size = copies_of(shapes, columns)
        mx.eval(sides, carried)

        def call(i: int, x: mx.array, copies=copies) -> mx.array:
            own = copies[i % len(copies)]
            whole = Together(x, width, MIXES + 1)
            return hyper_dense.by_kernel(own, whole, *sides, given=False, **OPTIONS).products

        yield f"{title}, with their input", call, carried, size
