"""The scores by which the lightning indexer's rows are chosen, for one token of each of a few sequences.

Coded rows are multiplied as integers: twice an E2M1 value is one, and 32 channels share a power of two.
"""

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer.buffers import Grown, filled
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
def kernel(coded: bool, many: int) -> Kernel:
    """The kernel for rows of E2M1 codes, or for plain ones, of so many sequences at most."""
    return coded_kernel(many) if coded else plain_kernel(many)


def index_scores(
    q: Columns,
    weights: Columns,
    rows: Sequence[Grown],
    places: mx.array,
    angles: mx.array,
    *,
    heads: int,
    form: Form,
    spread: bool,
    dtype: mx.Dtype,
) -> mx.array:
    """Scores of all index rows of S sequences, float32 (S, R): sum_h w_h relu(q_h . k_j).

    q float32 (N, heads * width), of the N tokens of a step: products of the indexer's wq_b, rounded to
    `dtype` here, as are the turned queries. weights float32 (N, heads): products of its weights_proj.
    rows: of each sequence, as `form` lays them out; row j lies in `full` while j < place[2], then in `tail`;
    R are as many as the largest has room for. places int32 (S, 8): the token is number place[4] of the
    N, at position p = place[0]; only the rows j < (p + 1) // 4 get a score, the others -inf. angles
    float32 (N, 4, 2, rope / 2), of which [:, 1] is read. `spread`: queries are Hadamard-transformed and
    FP4-rounded.
    """
    if takes(q, rows, heads, form.layout, spread, dtype):
        return by_kernel(
            q, weights, rows, places, angles, heads=heads, layout=form.layout, dtype=dtype
        )
    options = {"heads": heads, "form": form, "spread": spread, "dtype": dtype}
    return plain(q, weights, rows, places, angles, **options)


def takes(
    q: Columns, rows: Sequence[Grown], heads: int, layout: RowLayout, spread: bool, dtype: mx.Dtype
) -> bool:
    """Whether the kernel scores rows of this layout."""
    coded, width = layout.kind == "index", layout.width
    sizes = width in (32, 64, 128, 256) and heads * width <= 16384 if coded else width % 8 == 0
    known = spread == coded and dtype in (mx.bfloat16, mx.float32)
    enough = all(each.full.size >= 8 for each in rows)
    name = "index_scores_coded" if coded else "index_scores_plain"
    return sizes and known and enough and dispatch.active(q.array, name, dtype=dtype)


def by_kernel(
    q: Columns,
    weights: Columns,
    rows: Sequence[Grown],
    places: mx.array,
    angles: mx.array,
    *,
    heads: int,
    layout: RowLayout,
    dtype: mx.Dtype,
    most: int = MOST_GROUPS,
) -> mx.array:
    """`index_scores` in one launch, of `most` threadgroups a sequence.

    Coded rows are those of spread queries.
    """
    coded, width, tail = layout.kind == "index", layout.width, rows[0].tail
    count, many = _most(rows), len(rows)
    given = filled(rows)
    lying = [array for each in given for array in (each.full, each.tail.array)]
    template = [
        ("T", dtype),
        ("ROW", layout.dtype),
        ("HEADS", heads),
        ("WIDTH", width),
        ("ROPE", 2 * angles.shape[-1]),
        ("ELEMENTS", layout.elements),
        ("TAIL", tail.rows),
        ("ROWS_AT", tail.begin),
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
    (scores,) = kernel(coded, len(given))(
        [q.array, weights.array, places, angles, *lying],
        [((many, count), mx.float32)],
        groups=(min(most, -(-count // 32)), many, 1),
        threads=32 * GROUPS,
        template=template,
        reads=lambda: _read(rows, places, len(given)),
    )
    return scores


def _most(rows: Sequence[Grown]) -> int:
    """Rows that the largest of these has room for."""
    return max(len(each.full) + each.tail.rows for each in rows)


def _read(rows: Sequence[Grown], places: mx.array, many: int) -> dict[str, float]:
    """The shares of the settled rows that are read, of so many inputs."""
    shares = {f"full{i}": int(places[i, 2]) / len(each.full) for i, each in enumerate(rows)}
    shares |= {f"tails{i}": each.tail.share for i, each in enumerate(rows)}
    repeated = range(len(rows), many)
    return shares | {f"{name}{i}": 0.0 for i in repeated for name in ("full", "tails")}


def plain(
    q: Columns,
    weights: Columns,
    rows: Sequence[Grown],
    places: mx.array,
    angles: mx.array,
    *,
    heads: int,
    form: Form,
    spread: bool,
    dtype: mx.Dtype,
) -> mx.array:
    """`index_scores` by MLX's own operations; rows without a score get -inf."""
    width, most, scores = form.layout.width, _most(rows), []
    for own, place in zip(rows, places, strict=True):
        number = place[4]
        turns = angles[number, 1]
        queries = q.value[number].astype(dtype).reshape(1, heads, width)
        turned = rotate(queries, (turns[:1], turns[1:]))[0]
        if spread:
            turned = form.unpack(form.pack(mx.hadamard_transform(turned)))
        capacity, row = len(own.full), mx.arange(len(own.full) + own.tail.rows)
        lies = mx.where(row < place[2], row, capacity + row - place[2])
        keys = form.unpack(
            mx.concatenate([own.full, own.tail.value])[mx.minimum(lies, len(row) - 1)]
        )
        hits = mx.maximum(turned.astype(mx.float32) @ keys.T, 0)
        sums = (weights.value[number] * (width * heads) ** -0.5) @ hits
        seen = mx.where(row < (place[0] + 1) // RATIO, sums, -mx.inf)
        scores.append(mx.pad(seen, (0, most - len(row)), constant_values=-mx.inf))
    return mx.stack(scores)
