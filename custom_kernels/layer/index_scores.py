"""The scores by which the lightning indexer's rows are chosen, for one token of one sequence.

Coded rows are multiplied as integers: twice an E2M1 value is one, and 32 channels share a power of two.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer.buffers import Grown
from ds4mlx.custom_kernels.layer.index_texts import coded_kernel, plain_kernel
from ds4mlx.custom_kernels.layer.plain import rotate
from ds4mlx.custom_kernels.layer.row_layout import Form, RowLayout
from ds4mlx.custom_kernels.products.columns import Columns

RATIO = 4  # tokens to a row
GROUPS = 16  # SIMD-groups of a threadgroup
KEPT = 2  # coded rows of a thread, of at most 128 channels
LEAST_SPLIT = 0  # at least 1 << this many SIMD-groups share the heads of a row
MOST_GROUPS = 132  # threadgroups, which go on to further rows
BLOCK_BYTES = 16384  # of queries at a time, where they are float32


@lru_cache
def kernel(coded: bool) -> Kernel:
    """The kernel for rows of E2M1 codes, or for plain ones."""
    return coded_kernel() if coded else plain_kernel()


def index_scores(
    q: Columns,
    weights: Columns,
    rows: Grown,
    place: mx.array,
    angles: mx.array,
    *,
    heads: int,
    form: Form,
    spread: bool,
    dtype: mx.Dtype,
) -> mx.array:
    """Scores of all index rows, float32 (capacity + TAIL,): sum_h w_h relu(q_h . k_j).

    q float32 (N, heads * width), of the N tokens of a step: products of the indexer's wq_b, rounded to
    `dtype` here, as are the turned queries. weights float32 (N, heads): products of its weights_proj.
    rows: as `form` lays them out; row j lies in `full` while j < place[2], then in `tail`. place int32
    (8,): the token is number place[4], at position p = place[0]; only the rows j < (p + 1) // 4 get a
    score, the others -inf. angles float32 (N, 4, 2, rope / 2), of which [:, 1] is read. `spread`: queries
    are Hadamard-transformed and FP4-rounded.
    """
    if takes(q, rows, heads, form.layout, spread, dtype):
        return by_kernel(
            q, weights, rows, place, angles, heads=heads, layout=form.layout, dtype=dtype
        )
    options = {"heads": heads, "form": form, "spread": spread, "dtype": dtype}
    return plain(q, weights, rows, place, angles, **options)


def takes(
    q: Columns, rows: Grown, heads: int, layout: RowLayout, spread: bool, dtype: mx.Dtype
) -> bool:
    """Whether the kernel scores rows of this layout."""
    coded, width = layout.kind == "index", layout.width
    sizes = width in (32, 64, 128, 256) and heads * width <= 16384 if coded else width % 8 == 0
    known = spread == coded and dtype in (mx.bfloat16, mx.float32)
    enough = min(rows.full.size, rows.tail.size) >= 8
    name = "index_scores_coded" if coded else "index_scores_plain"
    return sizes and known and enough and dispatch.active(q.array, name, dtype=dtype)


def by_kernel(
    q: Columns,
    weights: Columns,
    rows: Grown,
    place: mx.array,
    angles: mx.array,
    *,
    heads: int,
    layout: RowLayout,
    dtype: mx.Dtype,
    most: int = MOST_GROUPS,
) -> mx.array:
    """`index_scores` in one launch, of `most` threadgroups; coded rows are those of spread queries."""
    coded, width = layout.kind == "index", layout.width
    count = len(rows.full) + len(rows.tail)
    template = [
        ("T", dtype),
        ("ROW", layout.dtype),
        ("HEADS", heads),
        ("WIDTH", width),
        ("ROPE", 2 * angles.shape[-1]),
        ("ELEMENTS", layout.elements),
        ("RATIO", RATIO),
        ("GROUPS", GROUPS),
        ("KEPT", KEPT if coded and width <= 128 else 1),
        ("LOG_GROUPS", GROUPS.bit_length() - 1),
        ("LEAST", LEAST_SPLIT),
        ("SHARE", bits((width * heads) ** -0.5)),
        ("ALL", q.array.shape[1]),
        ("QUERIES_AT", q.begin),
        ("ALL_PROJECTED", weights.array.shape[1]),
        ("WEIGHTS_AT", weights.begin),
    ]
    if coded:
        template += [("EACH", width // 32), ("PARTS", width // 32), ("ROOT", bits(width**-0.5))]
    else:
        template += [("BLOCK", max(1, min(heads, BLOCK_BYTES // (4 * width))))]
    (scores,) = kernel(coded)(
        [q.array, weights.array, *rows, place, angles],
        [((count,), mx.float32)],
        groups=(min(most, -(-count // 32)), 1, 1),
        threads=32 * GROUPS,
        template=template,
        reads=lambda: {"full": int(place[2]) / len(rows.full)},
    )
    return scores


def plain(
    q: Columns,
    weights: Columns,
    rows: Grown,
    place: mx.array,
    angles: mx.array,
    *,
    heads: int,
    form: Form,
    spread: bool,
    dtype: mx.Dtype,
) -> mx.array:
    """`index_scores` by MLX's own operations; rows without a score get -inf."""
    width, number = form.layout.width, place[4]
    turns = angles[number, 1]
    queries = q.value[number].astype(dtype).reshape(1, heads, width)
    turned = rotate(queries, (turns[:1], turns[1:]))[0]
    if spread:
        turned = form.unpack(form.pack(mx.hadamard_transform(turned)))
    capacity, row = len(rows.full), mx.arange(len(rows.full) + len(rows.tail))
    lies = mx.where(row < place[2], row, capacity + row - place[2])
    keys = form.unpack(mx.concatenate(list(rows))[mx.minimum(lies, len(row) - 1)])
    hits = mx.maximum(turned.astype(mx.float32) @ keys.T, 0)
    scores = (weights.value[number] * (width * heads) ** -0.5) @ hits
    return mx.where(row < (place[0] + 1) // RATIO, scores, -mx.inf)
