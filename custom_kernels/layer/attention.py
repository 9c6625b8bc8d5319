"""Core attention of one decoded token of one sequence, over rows of its state as they lie.

Two launches: shares of the rows, then their merge with the sink. How the rows are cut depends on the
token's position, which is data. Queries are normed and turned where they are loaded, and the result is
turned back.
"""

from functools import lru_cache
from typing import TypedDict, Unpack

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

LEAST = 8  # rows of a share, where there are so many
MOST_ROWS = 32  # of a block: the lanes that make its softmax
BLOCK_BYTES = 30720  # of threadgroup memory for a block's rows and the queries
WIDEST = 512  # channels, four of each of two times four heads to a thread
RATIOS = (0, 4, 128)


@lru_cache
def kernels() -> tuple[Kernel, Kernel]:
    """The kernel of a share of the rows, and the one that merges shares."""
    inputs = ["q", "old", "tail", "full", "newer", "chosen", "place", "angles"]
    share = Kernel("attention_share", inputs, ["parts", "softmax"], SHARE, FOURS + ROW + TURN)
    merged = ["parts", "softmax", "sink", "angles"]
    return share, Kernel("attention_merge", merged, ["out"], MERGE, FOURS + TURN)


class Options(TypedDict):
    """What a layer is, and its activations; see `attention`."""

    ratio: int
    before: int
    form: Form
    eps: float
    dtype: mx.Dtype


def attention(
    q: mx.array,
    sink: mx.array,
    window: Recent,
    rows: Grown | None,
    chosen: mx.array | None,
    place: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> mx.array:
    """What the heads of one token read: (H, c) of type `dtype`, rotary channels turned back.

    q float32, of H heads of c: the product of wq_b, read as `dtype`. sink float32 (H,). window: rows of positions
    max(0, p - before) to p are seen. rows: of a layer of ratio 4 or 128, None for 0; seen are those
    j < (p + 1) // ratio, or, with `chosen` int32 (K,), the rows named there; negative names are of none.
    place int32 (8,): the token's position p, the position at which the window's tail begins, and the rows
    before the tails of ratio 4 and 128. angles float32 (4, 2, rope / 2): cos and sin for layers of ratio 0,
    and for the others. All rows lie as `form` says. eps: of the norm of queries.
    """
    own = q, sink, window, rows, chosen, place, angles
    ratio, layout, dtype = options["ratio"], options["form"].layout, options["dtype"]
    way = by_kernel if takes(q, rows, angles, ratio=ratio, layout=layout, dtype=dtype) else plain
    return way(*own, **options)


def takes(
    q: mx.array,
    rows: Grown | None,
    angles: mx.array,
    *,
    ratio: int,
    layout: RowLayout,
    dtype: mx.Dtype,
) -> bool:
    """Whether the kernels take queries (H, c), for rows of a layout."""
    width, rope = layout.width, 2 * angles.shape[-1]
    sized = width % 128 == 0 and width <= WIDEST and rope <= width and q.size % width == 0
    lies = readable(layout, rope, dtype)
    known = ratio in RATIOS and (rows is not None) == (ratio > 0)
    typed = q.dtype == mx.float32 and dtype in (mx.bfloat16, mx.float32)
    return sized and lies and known and typed and dispatch.active(q, "attention", dtype=dtype)


def readable(layout: RowLayout, rope: int, dtype: mx.Dtype) -> bool:
    """Whether the kernels read rows of a layout, of which `rope` channels turn."""
    if layout.kind != "kv":
        return layout.kind == "plain" and layout.dtype == dtype
    aligned = layout.coded % 4 == 0 and layout.head % 4 == 0
    return aligned and layout.coded == layout.width - rope


def plain(
    q: mx.array,
    sink: mx.array,
    window: Recent,
    rows: Grown | None,
    chosen: mx.array | None,
    place: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> mx.array:
    """`attention` by MLX's own operations."""
    ratio, form, dtype = options["ratio"], options["form"], options["dtype"]
    cos, sin = angles[1 if ratio else 0]
    turns = cos[None], sin[None]
    queries = q.astype(dtype).reshape(1, -1, form.layout.width)
    heads = rotate(rms_norm(queries, None, options["eps"]), turns)[0]
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
    keys = mx.where(visible[:, None], mx.concatenate(values), 0)
    scores = (heads.astype(mx.float32) * form.layout.width**-0.5) @ keys.T
    scores = mx.where(visible, scores, -mx.inf)
    scores = mx.concatenate([scores, sink.astype(mx.float32)[:, None]], axis=-1)
    out = mx.softmax(scores, axis=-1, precise=True)[:, :-1] @ keys
    return rotate(out.astype(dtype)[None], turns, inverse=True)[0]


def by_kernel(
    q: mx.array,
    sink: mx.array,
    window: Recent,
    rows: Grown | None,
    chosen: mx.array | None,
    place: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> mx.array:
    """`attention` in two launches; see `takes`."""
    ratio, layout, dtype = options["ratio"], options["form"].layout, options["dtype"]
    width, block = layout.width, block_rows(layout.width, dtype)
    heads = q.size // width
    common = [
        ("T", dtype),
        ("H", heads),
        ("WIDTH", width),
        ("ROPE", 2 * angles.shape[-1]),
        ("ANGLES", 1 if ratio else 0),
        ("SHARES", SHARES),
    ]
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
    ]
    share, merge = kernels()
    parts, softmax = share(
        [q, *window, *(rows or window), place if chosen is None else chosen, place, angles],
        [((SHARES, heads, width), mx.float32), ((heads, SHARES, 2), mx.float32)],
        groups=(SHARES, -(-heads // HEADS), 1),
        threads=32 * HEADS,
        template=common + own,
        reads=lambda: _shares(rows, chosen, place, ratio),
    )
    return merge(
        [parts, softmax, sink.astype(mx.float32), angles],
        [((heads, width), dtype)],
        groups=(heads, width // 128, 1),
        threads=128,
        template=common,
    )[0]


def block_rows(width: int, dtype: mx.Dtype) -> int:
    """Rows of a block: as many as there is room for beside the queries."""
    return min(MOST_ROWS, BLOCK_BYTES // (width * dtype.size) - HEADS)


def _shares(
    rows: Grown | None, chosen: mx.array | None, place: mx.array, ratio: int
) -> dict[str, float]:
    """The share of `full` that is read."""
    if rows is None:
        return {}
    settled = int(place[2 if ratio == 4 else 3])
    count = settled if chosen is None else min(settled, len(chosen))
    return {"full": min(1.0, count / len(rows.full))}
