"""The first products of a sublayer, whose input every threadgroup makes for itself: one launch.

Streams are collapsed and normed as `hyper_in` does, into threadgroup memory, and multiplied by rows of
several matrices as `dense_matvec` does, by a SIMD-group each. A lane asks for its first weights before
the input is made. The first threadgroup makes the weights for what the sublayer gives, which are put
behind the products, and the second one, if asked, the input behind them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypedDict, Unpack

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer import hyper_in, hyper_text
from ds4mlx.custom_kernels.layer.after import FLOATS, After, Beside
from ds4mlx.custom_kernels.layer.carried import TAKE, Carried, Together
from ds4mlx.custom_kernels.layer.hyper_pre import MIXES
from ds4mlx.custom_kernels.products import dense_matvec
from ds4mlx.custom_kernels.products import dense_matvec_text as dense
from ds4mlx.custom_kernels.products.columns import Inside
from ds4mlx.custom_kernels.products.dense_matvec import Matrices
from ds4mlx.custom_kernels.words import LOAD8
from ds4mlx.formats import FORMATS

STEPS = 3  # pieces of a row that a lane loads at a time
MOST_WIDTH = 7168  # whose input leaves room in threadgroup memory for sums

# The input lies as float32, four columns to a word of 16 bytes. Lanes read words some columns apart:
# put in another order, the words that are read at a time lie in different banks.
_HEADER = """
inline uint place_of(uint quad) { return quad ^ ((quad >> 3) & 7u); }
struct Input {
  const threadgroup uint4* words;
  inline void quad(uint, uint i, thread float* v) const {
    uint4 q = words[place_of(i)];
    v[0] = as_type<float>(q.x); v[1] = as_type<float>(q.y);
    v[2] = as_type<float>(q.z); v[3] = as_type<float>(q.w);
  }
  inline void eight(uint t, uint i, thread float* v) const {
    quad(t, 2 * i, v); quad(t, 2 * i + 1, v + 4);
  }
};
template <typename T> inline uint stored(float v) { return as_type<uint>(float(static_cast<T>(v))); }
"""

_FIRST = """
    bool collapses = threadgroup_position_in_grid.x > 0;
    device float* post = products + AFTER_AT;
    device float* comb = post + 4;
"""

# A SIMD-group finds its matrix, which is of format number `kind`, and its row.
_FIND = """
    uint job = threadgroup_position_in_grid.x - 1, kind = 0, row = 0, rows = 0, at = 0, every = 0;
"""
_MATRIX = """
    {{
        uint each = uint(w{i}_weight_shape[0]), parts = (each - 1) / GROUPS + 1;
        if (collapses && rows == 0 && job < parts) {{
            kind = {kind}; row = job * GROUPS + group; rows = each; at = every;
            {planes}
        }}
        job -= parts;
        every += each;
    }}
"""

_STORE = """
    threadgroup uint4 words[WIDTH / 4];
    #pragma unroll
    for (uint i = 0; i < 2 * PASSES; i++) {
        uint c = 8 * (i / 2 * 32 * GROUPS + id) + i % 2 * 4;
        if (c < WIDTH) {
            uint4 q;
            q.x = stored<T>(y[4 * i]); q.y = stored<T>(y[4 * i + 1]);
            q.z = stored<T>(y[4 * i + 2]); q.w = stored<T>(y[4 * i + 3]);
            words[place_of(c / 4)] = q;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (row >= rows) return;
    Input input = {words};
"""
_GIVE = f"""
    device T* out = (device T*)(products + OUT_AT);
    if (threadgroup_position_in_grid.x == 1) {{
        if (AFTER_AT + {FLOATS} + id < OUT_AT) products[AFTER_AT + {FLOATS} + id] = 0;
{hyper_text.STORE}    }}
"""

_MULTIPLY = """{{
        multiply<{struct}, 1, 1, STEPS>(first, input, sums, lane, WIDTH);
        multiply_from<{struct}, 1, 1, STEPS>(m{k}, input, sums, row, rows, WIDTH, lane + 32 * STEPS);
    }}"""
_PUT = """
    put<1, 1, 1>(sums, 1, products + at, every, row, rows, lane);
"""


class Before(NamedTuple):
    """What comes before a sublayer: products of its input, and weights for what it gives.

    products float32 (B, all rows), side by side. after: post and comb, see `hyper_in`; x (B, D), the input,
    or None where nobody asked for it. Those of one token lie behind its products.
    """

    products: mx.array
    after: After | Beside
    x: mx.array | Inside | None


class Options(TypedDict):
    """As `hyper_in` has them; given: whether the input is asked for."""

    iterations: int
    eps: float
    norm_eps: float
    given: bool


@lru_cache
def kernel(formats: tuple[str, ...], given: bool) -> Kernel:
    """The kernel of matrices in these formats; the streams' type is a template argument."""
    kinds = list(dict.fromkeys(formats))
    inputs = ["carried", "base", "scale", "weight"]
    for i, name in enumerate(formats):
        inputs += [f"w{i}_{plane}" for plane in FORMATS[name].layout]
    header = (
        LOAD8
        + hyper_text.EIGHT
        + hyper_text.STORES
        + hyper_text.SIGMOID
        + hyper_in.HEADER
        + _HEADER
    )
    header += dense.LOAD4 + "".join(dense.FORMATS[name] for name in kinds) + dense.PRODUCT
    name = _name(formats) + "_given" * given
    body = _body(formats, kinds, given)
    return Kernel(
        name, inputs, ["products"], body, header, metal=hyper_in.METAL, cuda=hyper_in.CUDA
    )


def _body(formats: Sequence[str], kinds: Sequence[str], given: bool) -> str:
    """The text; what is done with a matrix is there once for each format."""
    find = _FIND
    for i, name in enumerate(formats):
        kind = kinds.index(name)
        planes = " ".join(f"m{kind}.{plane} = w{i}_{plane};" for plane in FORMATS[name].layout)
        find += _MATRIX.format(i=i, kind=kind, planes=planes)
    structs = "".join(f"    {dense.STRUCTS[name]} m{k};\n" for k, name in enumerate(kinds))
    fetch = "    Pieces<1, STEPS> first;\n" + _by_kind(
        kinds, "fetch(first, m{k}, row, rows, WIDTH, lane);", "collapses && "
    )
    multiply = "    float sums[1] = {0};\n" + _by_kind(kinds, _MULTIPLY) + _PUT
    made = hyper_text.MIXES + hyper_in.WEIGHTS + hyper_text.COLLAPSE + _GIVE * given
    return TAKE + _FIRST + hyper_text.LOADS + structs + find + fetch + made + _STORE + multiply


def _by_kind(kinds: Sequence[str], statement: str, also: str = "") -> str:
    """A statement for the format that the SIMD-group's matrix has."""
    each = [
        f"    if ({also}kind == {k}) {statement.format(k=k, struct=dense.STRUCTS[name])}\n"
        for k, name in enumerate(kinds)
    ]
    return "".join(each)


def _name(formats: Sequence[str]) -> str:
    return "_".join(("hyper_dense", *formats))


def hyper_dense(
    matrices: Matrices,
    carried: Carried,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    **options: Unpack[Options],
) -> Before:
    """`dense_matvec` of matrices (format, planes of (rows, D)) with what `hyper_in` gives.

    carried: streams (B, n, D) and their partial mixes; base, scale, norm: as `hyper_in` has them. Of one
    token a launch makes both, of more there is a launch for each.
    """
    way = by_kernel if takes(matrices, carried) else apart
    return way(matrices, carried, base, scale, norm, **options)


def takes(matrices: Matrices, carried: Carried) -> bool:
    """Whether the kernel multiplies matrices by what streams collapse to."""
    if not isinstance(carried, Together):
        return False
    width, kinds = carried.width, dict.fromkeys(name for name, _ in matrices)
    # In whole eights of words: `place_of` puts each eight in another order.
    if width > MOST_WIDTH or width % 32:
        return False
    if any(width % dense.COLUMNS.get(kind, width + 1) for kind in kinds):
        return False
    return dispatch.active(carried.array, *(_name([kind]) for kind in kinds))


def plain(
    matrices: Matrices,
    carried: Carried,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    **options: Unpack[Options],
) -> Before:
    """`hyper_dense` by MLX's own operations."""
    with dispatch.plain_operations():
        return apart(matrices, carried, base, scale, norm, **options)


def apart(
    matrices: Matrices,
    carried: Carried,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    **options: Unpack[Options],
) -> Before:
    """`hyper_dense` as two operations, each by a kernel or not."""
    x, post, comb = hyper_in.hyper_in(
        *(carried.streams, carried.partial, base, scale, norm),
        iterations=options["iterations"],
        eps=options["eps"],
        norm_eps=options["norm_eps"],
    )
    return Before(dense_matvec.dense_matvec(matrices, x), After(post, comb), x)


def by_kernel(
    matrices: Matrices,
    carried: Carried,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    **options: Unpack[Options],
) -> Before:
    """`hyper_dense` in one launch; see `takes`."""
    assert isinstance(carried, Together)
    given, width = options["given"], carried.width
    rows = [len(planes["weight"]) for _, planes in matrices]
    parts = sum(-(-each // hyper_text.GROUPS) for each in rows)
    size = sum(rows) + FLOATS
    begin = -(-size // 4) * 4  # from where on stores are of 16 bytes
    size = begin + width * carried.dtype.size // mx.float32.size if given else size
    sizes = carried.dtype, width, carried.slices, MIXES
    (products,) = kernel(tuple(name for name, _ in matrices), given)(
        [carried.array, base, scale, norm]
        + [planes[p] for name, planes in matrices for p in FORMATS[name].layout],
        [((1, size), mx.float32)],
        groups=(1 + parts, 1, 1),
        threads=32 * hyper_text.GROUPS,
        template=[
            *hyper_in.collapsing(*sizes, options["eps"], options["norm_eps"]),
            ("ITERATIONS", options["iterations"]),
            ("STEPS", STEPS),
            ("AFTER_AT", sum(rows)),
            *[("OUT_AT", begin)] * given,
        ],
    )
    x = Inside(products, begin, width, carried.dtype) if given else None
    return Before(products, Beside(products, sum(rows)), x)
