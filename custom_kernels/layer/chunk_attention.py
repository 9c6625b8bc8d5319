"""Core attention of many tokens of one sequence, on matrix units, over rows as the state lays them out.

One launch: neither scores nor unpacked rows are in memory. A token sees the window's rows up to its
own, and compressed rows, all that are complete or those chosen for it; its result is turned back.
"""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer import chunk_attention_text as text
from ds4mlx.custom_kernels.layer import chunk_attention_tiles as operands
from ds4mlx.custom_kernels.layer.attention import RATIOS, WIDEST, readable
from ds4mlx.custom_kernels.layer.attention_text import FOURS, ROW
from ds4mlx.custom_kernels.layer.plain import Angles, rotate
from ds4mlx.custom_kernels.layer.row_layout import Form
from ds4mlx.custom_kernels.layer.sink import sink_attention

NAME = "attention_chunk"


class Plan(NamedTuple):
    """What a threadgroup takes: heads, rows at a time; tiles of a SIMD-group, parts of the channels."""

    heads: int
    block: int
    tiles: int
    split: int
    bytes: int  # of threadgroup memory
    shared: int  # the same where a CUDA text cannot declare so much, or 0


def plan(heads: int, width: int, words: int, dtype: mx.Dtype) -> Plan:
    """The plan for rows of so many channels, and so many words as they lie."""
    wide = dtype == mx.bfloat16 and dialect.target() == "cuda"
    step, pad = (16, 8) if dtype == mx.bfloat16 else (8, 4)
    block = 64 if wide else step
    each = next(n for n in (16, 32, 64) if n >= min(heads, 64 if wide else 32))
    tiles = 2 if each == 64 else 1
    split = text.GROUPS * tiles * 16 * step // (each * block)
    elements = block * (width + pad) + each * (block + pad)
    size = elements * dtype.size + 4 * (split * each * (block + 4) + each + 2 * block)
    if wide:
        size += each * (width + pad) * dtype.size + 4 * block * words
    size = -(-size // 16) * 16
    return Plan(each, block, tiles, split, size, size if wide else 0)


@lru_cache
def kernel(dtype: mx.Dtype, shared: int) -> Kernel:
    """The kernel for activations of a type; shared: see `Plan`."""
    inputs = ["q", "window", "rows", "chosen", "place", "sink", "cosines", "sines"]
    if dtype == mx.float32:
        name, own, only = f"{NAME}_f32", operands.FLOAT, {}
    else:
        only = {"metal": operands.METAL_BF16, "cuda": operands.CUDA_BF16}
        name, own = f"{NAME}_bf16", operands.BF16
    header = FOURS + ROW + own + text.HEADER
    return Kernel(name, inputs, ["out"], text.BODY, header, **only, shared=shared)


def chunk_attention(
    q: mx.array,
    sink: mx.array,
    window: mx.array,
    rows: mx.array,
    chosen: mx.array | None,
    angles: Angles,
    *,
    start: int,
    ratio: int,
    before: int,
    form: Form,
) -> mx.array:
    """What the heads of L tokens read: (L, H, c) of q's type, rotary channels turned back.

    q (L, H, c) of the tokens from position `start` on, normed and turned. sink float32 (H,). window: the
    rows of positions max(0, start - before) to start + L - 1, of which a token at p sees those from
    max(0, p - before) to p. rows (R, .): of a layer of ratio 4 or 128; seen are those
    j < (p + 1) // ratio, or, with `chosen` int32 (L, K), those of them that are named there for the token;
    a row is named once at most, negative names are of none. angles: of the tokens. All rows lie as
    `form` says.
    """
    options = {"start": start, "ratio": ratio, "before": before, "form": form}
    if takes(q, sink, window, rows, angles, ratio=ratio, form=form):
        return by_kernel(q, sink, window, rows, chosen, angles, **options)
    return plain(q, sink, window, rows, chosen, angles, **options)


def takes(
    q: mx.array,
    sink: mx.array,
    window: mx.array,
    rows: mx.array,
    angles: Angles,
    *,
    ratio: int,
    form: Form,
) -> bool:
    """Whether the kernel takes all this."""
    width, rope = form.layout.width, 2 * angles[0].shape[-1]
    sized = width % 128 == 0 and width <= WIDEST and rope <= width == q.shape[-1]
    enough = min(window.size, rows.size or 8) >= 8 and q.size < dispatch.MOST_ELEMENTS
    known = ratio in RATIOS and readable(form.layout, rope, q.dtype) and len(sink) == q.shape[1]
    return sized and enough and known and dispatch.active(q, NAME)


def by_kernel(
    q: mx.array,
    sink: mx.array,
    window: mx.array,
    rows: mx.array,
    chosen: mx.array | None,
    angles: Angles,
    *,
    start: int,
    ratio: int,
    before: int,
    form: Form,
) -> mx.array:
    """`chunk_attention` in one launch; see `takes`."""
    length, heads, width = q.shape
    layout = form.layout
    words = layout.elements * layout.dtype.size // 4
    own = plan(heads, width, words, q.dtype)
    held = -(-heads // own.heads) * own.heads
    if held > heads:
        q = mx.pad(q, [(0, 0), (0, held - heads), (0, 0)])
    if chosen is not None and chosen.size < 8:  # or Metal would keep it elsewhere
        chosen = mx.pad(chosen, [(0, 0), (0, 8)], constant_values=-1)
    place = mx.array([start, max(0, start - before), 0, 0, 0, 0, 0, 0], dtype=mx.int32)
    many = 0 if chosen is None else chosen.shape[-1]
    return kernel(q.dtype, own.shared)(
        [
            *(q, window, rows if len(rows) else window, place if chosen is None else chosen, place),
            *(sink.astype(mx.float32), *angles),
        ],
        [((length, heads, width), q.dtype)],
        groups=(length, held // own.heads, 1),
        threads=32 * text.GROUPS,
        template=[
            *(("T", q.dtype), ("H", heads), ("HELD", held), ("WIDTH", width)),
            *(("ROPE", 2 * angles[0].shape[-1]), ("RATIO", ratio if len(rows) else 0)),
            *(("CHOSEN", many), ("BEFORE", before), ("WORDS", words), ("CODED", layout.coded)),
            *(("HEAD", layout.head), ("SCALE", bits(width**-0.5)), ("HEADS", own.heads)),
            *(("BLOCK", own.block), ("TILES", own.tiles), ("SPLIT", own.split)),
            ("BYTES", own.bytes),
        ],
    )[0]


def plain(
    q: mx.array,
    sink: mx.array,
    window: mx.array,
    rows: mx.array,
    chosen: mx.array | None,
    angles: Angles,
    *,
    start: int,
    ratio: int,
    before: int,
    form: Form,
) -> mx.array:
    """`chunk_attention` by MLX's own operations, all scores at once."""
    at = (start + mx.arange(len(q)))[:, None]
    places = max(0, start - before) + mx.arange(len(window))
    sources = [(form.unpack(window), (places <= at) & (places >= at - before))]
    if len(rows) and chosen is None:
        sources.append((form.unpack(rows), mx.arange(len(rows)) < (at + 1) // ratio))
    elif len(rows) and chosen is not None:
        named = form.unpack(rows[mx.maximum(chosen, 0).flatten()]).reshape(*chosen.shape, -1)
        seen = (chosen >= 0) & (chosen < (at + 1) // ratio)
        sources.append((mx.where(seen[..., None], named, 0), seen))
    out = sink_attention(q, sources, sink, q.shape[-1] ** -0.5)
    return rotate(out, angles, inverse=True)
