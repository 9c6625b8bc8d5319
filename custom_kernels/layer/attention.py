"""Core attention of one decoded token of each of a few sequences, over rows of their states as they lie.

A launch for the shares of the rows, then one that merges them with the sink. How the
rows are cut depends on the token's position, which is data. Queries are normed and turned where they
are loaded, and the result is turned back.
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
from ds4mlx.custom_kernels.layer.buffers import Grown, Recent, filled, numbered, picked, variant
from ds4mlx.custom_kernels.layer.plain import rms_norm, rotate
from ds4mlx.custom_kernels.layer.row_layout import Form, RowLayout
from ds4mlx.custom_kernels.products.columns import Columns

MOST = 8  # tokens: of more, their arrays would be more than Metal takes
LEAST = 8  # rows of a share, where there are so many
MOST_ROWS = 32  # of a block: the lanes that make its softmax
BLOCK_BYTES = 30720  # of threadgroup memory for a block's rows and the queries
WIDEST = 512  # channels, four of each of two times four heads to a thread
RATIOS = (0, 4, 128)


MERGE_KERNEL = Kernel("attention_merge", ["shares", "sink", "turns"], ["out"], MERGE, FOURS + TURN)


@lru_cache
def share_kernel(many: int) -> Kernel:
    """The kernel of a share of the rows of each of so many tokens at most."""
    names = ["old", "tails", "full"]
    inputs = ["products", "chosen", "places", "turns", *numbered(names, many)]
    body = SHARE.replace("PICKED", picked(names, "uint", many, "sequence"))
    return Kernel(variant("attention_share", many), inputs, ["shares"], body, FOURS + ROW + TURN)


class Read(NamedTuple):
    """What one token reads of its state.

    window: rows of positions max(0, p - before) to p are seen. rows: of a layer of ratio 4 or 128, None
    for 0; seen are those j < (p + 1) // ratio, or, where it selects, those chosen for it.
    """

    window: Recent
    rows: Grown | None
    selects: bool = False


class Options(TypedDict):
    """What a layer is, and its activations; see `attention`."""

    ratio: int
    before: int
    form: Form
    eps: float
    dtype: mx.Dtype


def attention(
    q: Columns,
    sink: mx.array,
    reads: Sequence[Read],
    chosen: mx.array | None,
    places: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> mx.array:
    """What the heads of N tokens read: (N, H, c) of type `dtype`, rotary channels turned back.

    q float32 (N, H c), of H heads: products of wq_b, read as `dtype`. sink float32 (H,). reads: of each
    token. chosen int32 (S, K): rows of those that select; negative names are of none. places int32
    (N, 8), of each: its position p, the position at which the window's tail begins, the rows before the
    tails of ratio 4 and 128, its number, and which of `chosen` are its own, or -1. angles float32
    (N, 4, 2, rope / 2): cos and sin for layers of ratio 0, and for the others. All rows lie as `form`
    says. eps: of the norm of queries.
    """
    ratio, layout, dtype = options["ratio"], options["form"].layout, options["dtype"]
    suits = len(reads) <= MOST and all(
        takes(q, each.rows, angles, ratio=ratio, layout=layout, dtype=dtype) for each in reads
    )
    return (by_kernel if suits else plain)(q, sink, reads, chosen, places, angles, **options)


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
    lies = q.aligned and readable(layout, rope, dtype)
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
    q: Columns,
    sink: mx.array,
    reads: Sequence[Read],
    chosen: mx.array | None,
    places: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> mx.array:
    """`attention` by MLX's own operations."""
    queries, dtype = q.value.astype(options["dtype"]), options["dtype"]
    width, which = options["form"].layout.width, 1 if options["ratio"] else 0
    outs = []
    told = zip(queries, angles[:, which], reads, places, strict=True)
    for own, table, read, place in told:
        turns = table[:1], table[1:]
        heads = rotate(rms_norm(own.reshape(1, -1, width), None, options["eps"]), turns)[0]
        named = chosen[place[5]] if read.selects and chosen is not None else None
        keys, visible = _seen(read, named, place, options)
        scores = (heads.astype(mx.float32) * width**-0.5) @ keys.T
        scores = mx.where(visible, scores, -mx.inf)
        scores = mx.concatenate([scores, sink.astype(mx.float32)[:, None]], axis=-1)
        out = mx.softmax(scores, axis=-1, precise=True)[:, :-1] @ keys
        outs.append(rotate(out.astype(dtype)[None], turns, inverse=True)[0])
    return mx.stack(outs)


def _seen(
    read: Read, chosen: mx.array | None, place: mx.array, options: Options
) -> tuple[mx.array, mx.array]:
    """The rows that a token may see, unpacked, and which of them it sees."""
    window, rows, _ = read
    ratio, form = options["ratio"], options["form"]
    position = place[0] + mx.arange(-options["before"], 1)
    near = mx.clip(position - place[1] + len(window.old), 0, None)
    values = [form.unpack(window.value[near])]
    seen = [position >= 0]
    if rows is not None:
        capacity, done = len(rows.full), place[2 if ratio == 4 else 3]
        number = mx.arange(capacity + rows.tail.rows) if chosen is None else chosen
        lies = mx.where(number < done, number, capacity + number - done)
        there = mx.clip(lies, 0, capacity + rows.tail.rows - 1)
        values.append(form.unpack(rows.value[there]))
        seen.append(number >= 0 if chosen is not None else number < (place[0] + 1) // ratio)
    visible = mx.concatenate(seen)
    # Rows that are not seen may be anything, NaN as well.
    return mx.where(visible[:, None], mx.concatenate(values), 0), visible


def by_kernel(
    q: Columns,
    sink: mx.array,
    reads: Sequence[Read],
    chosen: mx.array | None,
    places: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> mx.array:
    """`attention` in two launches; see `takes`."""
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
    shares = _shares(q, reads, chosen, places, angles, template, options)
    return MERGE_KERNEL(
        [shares, sink.astype(mx.float32), angles],
        [((many, heads, width), dtype)],
        groups=(heads, width // 128, many),
        threads=128,
        template=template,
    )[0]


def _shares(
    q: Columns,
    reads: Sequence[Read],
    chosen: mx.array | None,
    places: mx.array,
    angles: mx.array,
    common: list[tuple[str, Any]],
    options: Options,
) -> mx.array:
    """The sums of all shares of the tokens' rows, and of each the highest score and the weight."""
    ratio, layout, dtype = options["ratio"], options["form"].layout, options["dtype"]
    many, (window, rows, _) = len(reads), reads[0]
    named = chosen if any(each.selects for each in reads) else None
    given = filled(reads)
    lying = [
        array
        for each in given
        for array in (each.window.old, each.window.tail.array, (each.rows or each.window)[0])
    ]
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
        ("CHOSEN", 0 if named is None else named.shape[1]),
        ("BEFORE", options["before"]),
        ("KEEP", len(window.old)),
        ("WINDOW_AT", window.tail.begin),
        ("ROWS_AT", 0 if rows is None else rows.tail.begin),
        ("WORDS", layout.elements * layout.dtype.size // 4),
        ("CODED", layout.coded),
        ("HEAD", layout.head),
        ("EPS", bits(options["eps"])),
        ("SCALE", bits(width**-0.5)),
        ("ALL", q.array.shape[1]),
        ("QUERIES_AT", q.begin),
    ]
    return share_kernel(len(given))(
        [q.array, places if named is None else named, places, angles, *lying],
        [((many, SHARES * heads * (width + 2)), mx.float32)],
        groups=(SHARES, -(-heads // HEADS), many),
        threads=32 * HEADS,
        template=common + own,
        reads=lambda: _read(given, many, places, chosen, ratio),
    )[0]


def block_rows(width: int, dtype: mx.Dtype) -> int:
    """Rows of a block: as many as there is room for beside the queries."""
    return min(MOST_ROWS, BLOCK_BYTES // (width * dtype.size) - HEADS)


def _read(
    given: Sequence[Read], many: int, places: mx.array, chosen: mx.array | None, ratio: int
) -> dict[str, float]:
    """The shares of the inputs that are read, where that is not all; the first `many` count."""
    shares = {}
    for i, (window, rows, selects) in enumerate(given):
        if i >= many:
            shares |= {f"{name}{i}": 0.0 for name in ("old", "tails", "full")}
            continue
        shares[f"tails{i}"] = window.tail.share + (0.0 if rows is None else rows.tail.share)
        if rows is not None:
            count = int(places[i, 2 if ratio == 4 else 3])
            count = min(count, chosen.shape[1]) if selects and chosen is not None else count
            shares[f"full{i}"] = min(1.0, count / len(rows.full))
    return shares
