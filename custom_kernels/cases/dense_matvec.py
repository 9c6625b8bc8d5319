"""Products with a few rows of activations by the kernel beside those by plain operations."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx

from ds4mlx.custom_kernels.cases.base import Case, Pairs, normal
from ds4mlx.custom_kernels.products import dense_matvec
from ds4mlx.custom_kernels.products.columns import side_by_side
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.formats import FORMATS

KINDS = ("mxfp8", "q8_0", "bf16", "f16", "f32")
F32, BF16 = mx.float32, mx.bfloat16
Shapes = Sequence[tuple[str, int]]  # format and rows of every matrix of a launch


def products(
    dtype: mx.Dtype,
    shapes: Shapes,
    columns: int,
    tokens: int,
    *,
    groups: int = 0,
    out: mx.Dtype = F32,
    scale: float = 1.0,
) -> Pairs:
    """Matrices (format, rows) times x of a type, in groups or not."""
    planes = [random_planes(name, (n, columns), i) for i, (name, n) in enumerate(shapes)]
    matrices = [(name, each) for (name, _), each in zip(shapes, planes, strict=True)]
    shape = (tokens, groups, columns) if groups else (tokens, columns)
    x = normal(shape, dtype, 9, scale)
    got = dense_matvec.by_kernel(matrices, x, out)
    want = dense_matvec.plain(matrices, x)
    widths = [n for _, n in shapes]
    sides = (side_by_side(array, widths) for array in (got, want))
    return [(a.value, b.value) for a, b in zip(*sides, strict=True)]


def _case(dtype: mx.Dtype, shapes: Shapes, columns: int, tokens: int, **options) -> Case:
    sizes = " + ".join(f"{name} {rows}" for name, rows in shapes)
    notes = "".join(f", {name} {value}" for name, value in options.items())
    call = partial(products, dtype, shapes, columns, tokens, **options)
    return Case(f"dense_matvec {sizes} by {columns}, {tokens} rows{notes}", dtype, call)


def small() -> Iterator[Case]:
    """Every format and number of tokens; odd numbers of rows, columns that leave lanes idle."""
    for dtype in (F32, BF16):
        for tokens, kind in zip((3, 8, 5, 2, 6), KINDS, strict=True):
            yield _case(dtype, [(kind, 37)], 352, tokens)
        for tokens, kind in zip((1, 4, 1, 7, 1), KINDS, strict=True):
            yield _case(dtype, [(kind, 3 * 21)], 96, tokens, groups=3, out=dtype)
        mixed = [("mxfp8", 19), ("q8_0", 5), ("bf16", 34), ("f16", 1), ("f32", 3), ("bf16", 2)]
        yield _case(dtype, mixed, 544, 3)
        yield _case(dtype, [("mxfp8", 11), ("q8_0", 3)], 8192, 1, out=dtype)
        yield _case(dtype, [("bf16", 5)], 8200, 1)
    yield _case(BF16, [("mxfp8", 21), ("bf16", 9)], 288, 2)
    yield from tiles()


def tiles() -> Iterator[Case]:
    """What matrix units can do: rows of whole tiles and not, SIMD-groups with several chunks and none."""
    for kind, tokens, columns in (("mxfp8", 8, 384), ("q8_0", 5, 1280), ("bf16", 7, 1152)):
        yield _case(BF16, [(kind, 37)], columns, tokens)
        yield _case(BF16, [(kind, 2 * 25)], 256, 13 - tokens, groups=2, out=BF16)
    yield _case(BF16, [("q8_0", 16), ("mxfp8", 3), ("bf16", 33)], 128, 6)
    for kind, scale in (("mxfp8", 1e25), ("q8_0", 1e-25), ("bf16", 1e30)):
        yield _case(BF16, [(kind, 20)], 256, 6, scale=scale)


def wide() -> Iterator[Case]:
    """Flash's widths, as many rows as make a SIMD-group take several; activations far from 1."""
    for dtype in (F32, BF16):
        for kind in KINDS:
            yield _case(dtype, [(kind, 2053)], 1024 if kind in ("mxfp8", "q8_0") else 512, 4)
        yield _case(dtype, [("mxfp8", 4099), ("bf16", 21)], 512, 1)
        yield _case(dtype, [("mxfp8", 8 * 9)], 4096, 1, groups=8)
        yield _case(dtype, [("mxfp8", 25)], 8192, 8, out=dtype)
        yield _case(dtype, [("bf16", 4100)], 256, 8)
    for kind, scale in (("mxfp8", 1e25), ("q8_0", 1e-25), ("bf16", 1e30)):
        yield _case(BF16, [(kind, 40)], 256, 2, scale=scale)


Timed = tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]

# Matrices of a launch (format, rows), columns and groups at Flash's sizes.
FLASH: dict[str, tuple[Shapes, int, int]] = {
    "wq_b": ([("mxfp8", 32768)], 1024, 0),
    "wo_a": ([("mxfp8", 8192)], 4096, 8),
    "wo_b": ([("mxfp8", 4096)], 8192, 0),
    "wq_b as Q8_0": ([("q8_0", 32768)], 1024, 0),
    "shared w1, w3, router": ([("mxfp8", 2048), ("mxfp8", 2048), ("bf16", 256)], 4096, 0),
    "wq_a, wkv, compressors": (
        [
            ("mxfp8", 1024),
            ("mxfp8", 512),
            *[("bf16", 1024)] * 2,
            *[("bf16", 256)] * 2,
            ("bf16", 64),
        ],
        4096,
        0,
    ),
    "head": ([("bf16", 129280)], 4096, 0),
}
CACHE = 256 << 20  # bytes that no cache keeps


def nbytes_of(shapes: Shapes, columns: int) -> int:
    """The bytes of the matrices of a launch."""
    return int(sum(rows * columns * FORMATS[name].bits / 8 for name, rows in shapes))


def copies_of(
    shapes: Shapes, columns: int
) -> tuple[list[list[tuple[str, dict[str, mx.array]]]], int]:
    """The matrices of a launch, so often that no cache keeps them all, and the bytes of one copy."""
    size = nbytes_of(shapes, columns)
    copies = [
        [(name, random_planes(name, (rows, columns), i)) for name, rows in shapes]
        for i in range(max(2, CACHE // size + 1))
    ]
    mx.eval([planes for matrices in copies for _, planes in matrices])
    return copies, size


def timed(tokens: Sequence[int] = (1, 2, 4, 8)) -> Iterator[Timed]:
    """At Flash's sizes: (title, call(i, x), x, bytes read); call depends on x, i turns the weights."""
    for title, (shapes, columns, groups) in FLASH.items():
        copies, size = copies_of(shapes, columns)
        for count in tokens:
            x = normal((count, groups, columns) if groups else (count, columns), BF16, 1)

            def call(i: int, x: mx.array, copies=copies) -> mx.array:
                return dense_matvec.by_kernel(copies[i % len(copies)], x)

            yield f"{title}, {count} rows", call, x, size
