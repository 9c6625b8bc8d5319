"""The last product of a sublayer, and at once the streams that come of it with their mixes: one launch.

A threadgroup multiplies as many rows of the matrix as `hyper_out` has channels in a slice, a SIMD-group a
few of them, as `dense_matvec` does. Then it merges its slice into the streams, and multiplies their
part of the next matrix `fn`, for which its threads asked before the product.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer import hyper_after_text as text
from ds4mlx.custom_kernels.layer import hyper_out
from ds4mlx.custom_kernels.layer.after import After, Beside
from ds4mlx.custom_kernels.layer.carried import Carried, Together, carry, size
from ds4mlx.custom_kernels.layer.hyper_out import SLICE
from ds4mlx.custom_kernels.products import dense_matvec
from ds4mlx.custom_kernels.products import dense_matvec_text as dense
from ds4mlx.custom_kernels.words import LOAD8
from ds4mlx.formats import FORMATS, Planes

GROUPS = 16  # SIMD-groups of a threadgroup
HEIGHT = SLICE // GROUPS  # rows of a SIMD-group
STEPS = 4  # pieces of each row that a lane loads at a time

_BODY = """
    threadgroup float given[32];
    uint lane = thread_index_in_simdgroup;
    {begin}
    {struct} m;
    {planes}
    uint columns = uint(heads_shape[1]), row0 = slice * 32 + group * HEIGHT, which = 0;
    Rows<T> taken = {{heads, 0, 0}};
    float sums[HEIGHT];
    #pragma unroll
    for (uint i = 0; i < HEIGHT; i++) sums[i] = 0;
    multiply_from<{struct}, HEIGHT, 1, STEPS>(m, taken, sums, row0, uint(WIDTH), columns, lane);
    float total = totals<HEIGHT>(sums, lane, which);
    if (lane < HEIGHT) given[group * HEIGHT + which] = total;
    {merge}
"""


@lru_cache
def kernel(format: str) -> Kernel:
    """The kernel of a matrix in a format; the streams' type is a template argument."""
    planes = {plane: f"w_{plane}" for plane in FORMATS[format].layout}
    taken = " ".join(f"m.{plane} = {name};" for plane, name in planes.items())
    parts = {"begin": text.BEGIN, "merge": text.merge("given[lane]")}
    body = _BODY.format(struct=dense.STRUCTS[format], planes=taken, **parts)
    header = LOAD8 + dense.LOAD4 + dense.FORMATS[format] + dense.PRODUCT
    inputs = ["carried", "after", "fn", "heads", *planes.values()]
    return Kernel(f"dense_hyper_{format}", inputs, ["made"], body, header)


def dense_hyper(
    format: str,
    planes: Planes,
    heads: mx.array,
    carried: Carried,
    after: After | Beside,
    fn: mx.array,
) -> Carried:
    """`hyper_out` of what `dense_matvec` gives: new streams, and their partial mixes.

    planes: of a matrix (D, columns) in a format. heads (B, columns), in the streams' type. after: the
    weights for the product; fn: as `hyper_out` has it. Of one token, whose weights lie beside other values,
    a launch makes both; else there is a launch for each.
    """
    way = by_kernel if takes(format, heads, carried, after, fn) else apart
    return way(format, planes, heads, carried, after, fn)


def takes(
    format: str, heads: mx.array, carried: Carried, after: After | Beside, fn: mx.array
) -> bool:
    """Whether the kernel multiplies heads by a matrix in a format and merges into streams."""
    suits = isinstance(carried, Together) and isinstance(after, Beside)
    suits = suits and len(fn) <= hyper_out.MOST_ROWS and format in dense.COLUMNS
    suits = suits and heads.dtype == carried.dtype
    suits = suits and heads.shape[-1] % dense.COLUMNS[format] == 0
    return suits and dispatch.active(heads, f"dense_hyper_{format}")


def plain(
    format: str,
    planes: Planes,
    heads: mx.array,
    carried: Carried,
    after: After | Beside,
    fn: mx.array,
) -> Carried:
    """`dense_hyper` by MLX's own operations."""
    with dispatch.plain_operations():
        return apart(format, planes, heads, carried, after, fn)


def apart(
    format: str,
    planes: Planes,
    heads: mx.array,
    carried: Carried,
    after: After | Beside,
    fn: mx.array,
) -> Carried:
    """`dense_hyper` as two operations, each by a kernel or not."""
    out = dense_matvec.dense_matvec([(format, planes)], heads)
    return carry(*hyper_out.hyper_out(carried.streams, [out], after.post, after.comb, fn))


def by_kernel(
    format: str,
    planes: Planes,
    heads: mx.array,
    carried: Carried,
    after: After | Beside,
    fn: mx.array,
) -> Carried:
    """`dense_hyper` in one launch; see `takes`."""
    assert isinstance(carried, Together) and isinstance(after, Beside)
    width, rows = carried.width, len(fn)
    slices = -(-width // SLICE)
    (made,) = kernel(format)(
        [carried.array, after.array, fn, heads, *(planes[p] for p in FORMATS[format].layout)],
        [((1, size(width, slices, rows + 1, carried.dtype)), carried.dtype)],
        groups=(slices, 1, 1),
        threads=32 * GROUPS,
        template=[
            ("T", carried.dtype),
            ("WIDTH", width),
            *text.template(rows, GROUPS, after.begin),
            ("GROUPS", GROUPS),
            ("HEIGHT", HEIGHT),
            ("STEPS", STEPS),
        ],
    )
    return Together(made, width, rows + 1)
