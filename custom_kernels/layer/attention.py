"""Core attention of one decoded token of each of a few sequences, over rows of their states as they lie.

A launch for each token's shares of its rows, then one that merges those of all with the sink. How the rows are cut depends on the
token's position, which is data. Queries are normed and turned where they are loaded, and the result is
turned back.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict, Unpack

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer.attention_text import (
    FOURS,
    HEADS,
    MERGE,
    ROW,
    SHARE,
    SHARES,
    TURN,
)
from ds4mlx.custom_kernels.layer.buffers import Grown, Recent
from ds4mlx.custom_kernels.layer.plain import rms_norm, rotate
from ds4mlx.custom_kernels.layer.row_layout import Form, RowLayout
from ds4mlx.custom_kernels.products.columns import Columns

LEAST = 8  # rows of a share, where there are so many
MOST_ROWS = 32  # of a block: the lanes that make its softmax
BLOCK_BYTES = 30720  # of threadgroup memory for a block's rows and the queries
WIDEST = 512  # channels, four of each of two times four heads to a thread
RATIOS = (0, 4, 128)


@lru_cache
def share_kernel() -> Kernel:
    """The kernel of a share of the rows of a token."""
    inputs = ["products", "old", "tail", "full", "newer", "chosen", "place", "turns"]
    return Kernel("attention_share", inputs, ["shares"], SHARE, FOURS + ROW + TURN)


@lru_cache
def merge_kernel(many: int) -> Kernel:
    """The kernel that merges the shares of so many tokens at most."""
    shares = [f"shares{i}" for i in range(many)]
    others = "\n".join(f"    if (token == {i}) parts = shares{i};" for i in range(1, many))
    name = "attention_merge" + (f"_{many}" if many > 1 else "")
    return Kernel(name, [*shares, "sink", "turns"], ["out"], MERGE % others, FOURS + TURN)


class Read(NamedTuple):
    """What one token reads, and where it stands.

    window: rows of positions max(0, p - before) to p are seen. rows: of a layer of ratio 4 or 128, None
    for 0; seen are those j < (p + 1) // ratio, or, with `chosen` int32 (K,), the rows named there;
    negative names are of none. place int32 (8,): the token's position p, the position at which the
    window's tail begins, the rows before the tails of ratio 4 and 128, and its number among the tokens.
    """

    window: Recent
    rows: Grown | None
    chosen: mx.array | None
    place: mx.array


class Options(TypedDict):
    """What a layer is, and its activations; see `attention`."""

    ratio: int
    before: int
    form: Form
    eps: float
    dtype: mx.Dtype


def attention(
    q: Columns, sink: mx.array, reads: Sequence[Read], angles: mx.array, **options: Unpack[Options]
) -> mx.array:
    """What the heads of N tokens read: (N, H, c) of type `dtype`, rotary channels turned back.

    q float32 (N, H c), of H heads: products of wq_b, read as `dtype`. sink float32 (H,). reads: of each
    token, in the order of their numbers. angles float32 (N, 4, 2, rope / 2): cos and sin for layers of
    ratio 0, and for the others. All rows lie as `form` says. eps: of the norm of queries.
    """
    ratio, layout, dtype = options["ratio"], options["form"].layout, options["dtype"]
    suits = all(
        takes(q, each.rows, angles, ratio=ratio, layout=layout, dtype=dtype) for each in reads
    )
    return (by_kernel if suits else plain)(q, sink, reads, angles, **options)


def takes(
    q: Columns,
    rows: Grown | None,
    angles: mx.array,
    *,
    ratio: int,
    layout: RowLayout,
    dtype: mx.Dtype,
) -> bool:
    """Whether the kernels take queries (N, H c), for rows of a layout."""
    width, rope, array = layout.width, 2 * angles.shape[-1], q.array
    sized = width % 128 == 0 and width <= WIDEST and rope <= width and q.width % width == 0
    sized = sized and q.begin % 4 == 0 and (len(array) == 1 or array.shape[1] % 4 == 0)
    lies = readable(layout, rope, dtype)
    known = ratio in RATIOS and (rows is not None) == (ratio > 0)
    typed = array.dtype == mx.float32 and dtype in (mx.bfloat16, mx.float32)
    return sized and lies and known and typed and dispatch.active(array, "attention", dtype=dtype)


def readable(layout: RowLayout, rope: int, dtype: mx.Dtype) -> bool:
    """Whether the kernels read rows of a layout, of which `rope` channels turn."""
    if layout.kind != "kv":
        return layout.kind == "plain" and layout.dtype == dtype
    aligned = layout.coded % 4 == 0 and layout.head % 4 == 0
    return aligned and layout.coded == layout.width - rope


def plain(
    q: Columns, sink: mx.array, reads: Sequence[Read], angles: mx.array, **options: Unpack[Options]
) -> mx.array:
    """`attention` by MLX's own operations."""
    queries, dtype = q.value.astype(options["dtype"]), options["dtype"]
    width, which = options["form"].layout.width, 1 if options["ratio"] else 0
    outs = []
    for own, table, read in zip(queries, angles[:, which], reads, strict=True):
        turns = table[:1], table[1:]
        heads = rotate(rms_norm(own.reshape(1, -1, width), None, options["eps"]), turns)[0]
        keys, visible = _seen(read, options)
        scores = (heads.astype(mx.float32) * width**-0.5) @ keys.T
        scores = mx.where(visible, scores, -mx.inf)
        scores = mx.concatenate([scores, sink.astype(mx.float32)[:, None]], axis=-1)
        out = mx.softmax(scores, axis=-1, precise=True)[:, :-1] @ keys
        outs.append(rotate(out.astype(dtype)[None], turns, inverse=True)[0])
    return mx.stack(outs)


def _seen(read: Read, options: Options) -> tuple[mx.array, mx.array]:
    """The rows that a token may see, unpacked, and which of them it sees."""
    window, rows, chosen, place = read
    ratio, form = options["ratio"], options["form"]
    position = place[0] + mx.arange(-options["before"], 1)
    near = mx.clip(position - place[1] + len(window.old), 0, None)
    values = [form.unpack(mx.concatenate(list(window))[near])]
    seen = [position >= 0]
    if rows is not None:
        capacity, done = len(rows.full), place[2 if ratio == 4 else 3]
        number = mx.arange(capacity + len(rows.tail)) if chosen is None else chosen
        lies = mx.where(number < done, number, capacity + number - done)
        there = mx.clip(lies, 0, capacity + len(rows.tail) - 1)
        values.append(form.unpack(mx.concatenate(list(rows))[there]))
        seen.append(number >= 0 if chosen is not None else number < (place[0] + 1) // ratio)
    visible = mx.concatenate(seen)
    # Rows that are not seen may be anything, NaN as well.
    return mx.where(visible[:, None], mx.concatenate(values), 0), visible


def by_kernel(
    q: Columns, sink: mx.array, reads: Sequence[Read], angles: mx.array, **options: Unpack[Options]
) -> mx.array:
    """`attention` in a launch for each token and one for all; see `takes`."""
    width, dtype = options["form"].layout.width, options["dtype"]
    heads, many = q.width // width, len(reads)
    template = [
        ("T", dtype),
        ("H", heads),
        ("WIDTH", width),
        ("ROPE", 2 * angles.shape[-1]),
        ("ANGLES", 1 if options["ratio"] else 0),
        ("SHARES", SHARES),
    ]
    shares = [_share(q, read, angles, template, options) for read in reads]
    shares += shares[:1] * ((1 << (many - 1).bit_length()) - many)
    return merge_kernel(len(shares))(
        [*shares, sink.astype(mx.float32), angles],
        [((many, heads, width), dtype)],
        groups=(heads, width // 128, many),
        threads=128,
        template=template,
    )[0]


def _share(
    q: Columns, read: Read, angles: mx.array, common: list[tuple[str, Any]], options: Options
) -> mx.array:
    """The sums of all shares of the rows of a token, and of each the highest score and the weight."""
    window, rows, chosen, place = read
    ratio, layout, dtype = options["ratio"], options["form"].layout, options["dtype"]
    width, block = layout.width, block_rows(layout.width, dtype)
    heads = q.width // width
    own = [
        ("SIZE", dtype.size),
        ("HEADS", HEADS),
        ("CHUNKS", width // 128),
        ("BLOCK", block),
        ("ROWS", -(-block // HEADS)),
        ("LEAST", LEAST),
        ("RATIO", ratio),
        ("CHOSEN", 0 if chosen is None else len(chosen)),
        ("BEFORE", options["before"]),
        ("KEEP", len(window.old)),
        ("WORDS", layout.elements * layout.dtype.size // 4),
        ("CODED", layout.coded),
        ("HEAD", layout.head),
        ("EPS", bits(options["eps"])),
        ("SCALE", bits(width**-0.5)),
        ("ALL", q.array.shape[1]),
        ("QUERIES_AT", q.begin),
    ]
    return share_kernel()(
        [q.array, *window, *(rows or window), place if chosen is None else chosen, place, angles],
        [((SHARES * heads * (width + 2),), mx.float32)],
        groups=(SHARES, -(-heads // HEADS), 1),
        threads=32 * HEADS,
        template=common + own,
        reads=lambda: _read(rows, chosen, place, ratio),
    )[0]


def block_rows(width: int, dtype: mx.Dtype) -> int:
    """Rows of a block: as many as there is room for beside the queries."""
    return min(MOST_ROWS, BLOCK_BYTES // (width * dtype.size) - HEADS)


def _read(
    rows: Grown | None, chosen: mx.array | None, place: mx.array, ratio: int
) -> dict[str, float]:
    """The share of `full` that is read."""
    if rows is None:
        return {}
    settled = int(place[2 if ratio == 4 else 3])
    count = settled if chosen is None else min(settled, len(chosen))
    return {"full": min(1.0, count / len(rows.full))}
