"""What one decoded token of one sequence adds to a layer's state, in one launch.

The row of its window; for each compressor the token's projection, and the compressed row that it
completes, if it does. Tails come back whole, with the token in them. One sequence's launch also norms the
query latents of all tokens of the step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.layer.buffers import Grown, Recent
from ds4mlx.custom_kernels.layer.plain import rms_norm, rotate
from ds4mlx.custom_kernels.layer.row_layout import Form, RowLayout
from ds4mlx.custom_kernels.layer.rows_text import WORDS, kernel
from ds4mlx.custom_kernels.products.columns import Columns

RATIOS = (0, 4, 128)
GROUPS = 16  # SIMD-groups of a threadgroup; of 32, a GPU's registers would just suffice to pool
KV_GROUP, INDEX_GROUP = 64, 32  # channels that share an exponent


class Pooling(NamedTuple):
    """One compressor, that of the KV rows or the indexer's, and what it makes of the token.

    `channels` is twice the width for ratio 4, and the width for ratio 128.
    """

    values: Columns  # float32 (N, channels): products of its wkv with x
    scores: Columns  # float32 (N, channels): products of its wgate with x, without the bias
    ape: mx.array  # (ratio, channels): bias of a token's place in its group
    norm: mx.array  # (width,): weight of its RMSNorm
    recent: Recent  # its projections, float32 (rows, 2, channels)
    rows: Grown  # its rows
    form: Form  # how they lie
    spread: bool  # whether they are Hadamard-transformed


class NewRows(NamedTuple):
    """The query latents, and tails with the token in them."""

    latents: mx.array | None  # (N, rank), normed
    window: mx.array  # as the window's tail
    poolings: list[tuple[mx.array, mx.array]]  # the tails of projections and rows


class Options(TypedDict):
    """What a layer is, and its activations; see `new_rows`."""

    ratio: int
    form: Form
    eps: float
    dtype: mx.Dtype
    latents: bool


def new_rows(
    kv: Columns,
    latent: Columns,
    kv_norm: mx.array,
    q_norm: mx.array,
    window: Recent,
    poolings: Sequence[Pooling],
    place: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> NewRows:
    """What a token adds to a layer of a ratio (0, 4, 128); see `NewRows`.

    kv (N, width) and latent (N, rank) float32: products of wkv and wq_a with x of the N tokens of a step,
    read as `dtype`, which all activations have. kv_norm, q_norm: weights. The window's rows lie as `form`
    says. place int32 (8,): the token's position, the position at which tails begin, the rows before the
    tails of ratio 4 and 128, and which of the N tokens it is. angles float32 (N, 4, 2, rope / 2), of each:
    cos and sin for the window row of a layer of ratio 0, of the others, and for a row of ratio 4 and 128.
    A compressor's tail of rows has room for the row that the token completes; where it completes none,
    the tail stays as it is. latents: whether the query latents of all N tokens are made.
    """
    own = kv, latent, kv_norm, q_norm, window, poolings, place, angles
    ratio, form, dtype = options["ratio"], options["form"], options["dtype"]
    products = [kv, latent, *(side for each in poolings for side in (each.values, each.scores))]
    suits = takes(products, poolings, angles, ratio=ratio, form=form, dtype=dtype)
    return (by_kernel if suits else plain)(*own, **options)


def takes(
    products: Sequence[Columns],
    poolings: Sequence[Pooling],
    angles: mx.array,
    *,
    ratio: int,
    form: Form,
    dtype: mx.Dtype,
) -> bool:
    """Whether the kernel takes products, for rows of these forms."""
    threads, rope = 32 * GROUPS, 2 * angles.shape[-1]
    layouts = [form.layout, *(each.form.layout for each in poolings)]
    pooled = all(each.form.layout.width % 16 == 0 for each in poolings)
    suits = ratio in RATIOS and pooled and all(_suits(each, threads, rope) for each in layouts)
    suits = suits and all(each == form.layout for each in layouts if each.kind == "kv")
    spreads = all(_power_of_two(each.form.layout.width) for each in poolings if each.spread)
    typed, name = dtype in (mx.bfloat16, mx.float32), f"rows_{ratio}_{form.layout.kind}"
    array = products[0].array
    lie = all(each.array is array and each.aligned for each in products)
    return suits and spreads and typed and lie and dispatch.active(array, name, dtype=dtype)


def _suits(layout: RowLayout, threads: int, rope: int) -> bool:
    """Whether rows of a layout are pairs of channels of the threads, in whole groups."""
    if layout.width % 2 or not 0 < rope <= layout.width <= 2 * threads:
        return False
    if layout.kind == "kv":
        return layout.coded % KV_GROUP == 0 and layout.coded == layout.width - rope
    return layout.kind == "plain" or layout.width % INDEX_GROUP == 0


def _power_of_two(width: int) -> bool:
    return width & (width - 1) == 0


def plain(
    kv: Columns,
    latent: Columns,
    kv_norm: mx.array,
    q_norm: mx.array,
    window: Recent,
    poolings: Sequence[Pooling],
    place: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> NewRows:
    """`new_rows` by MLX's own operations."""
    ratio, form = options["ratio"], options["form"]
    eps, dtype = options["eps"], options["dtype"]
    slot, number = place[0] - place[1], place[4]
    angles = angles[number]
    row = rms_norm(kv.value[number].astype(dtype)[None], kv_norm, eps)
    row = rotate(row, _angles(angles, 1 if ratio else 0))
    normed = rms_norm(latent.value.astype(dtype), q_norm, eps) if options["latents"] else None
    tails = []
    for each in poolings:
        scores = each.scores.value[number] + each.ape[place[0] % ratio]
        projected = mx.stack([each.values.value[number], scores])
        recent = each.recent._replace(tail=_with_row(each.recent.tail, projected, slot))
        row_of = _compressed(each, recent, place, angles, ratio, eps, dtype)
        # A row that is not complete is put where there is none.
        at = place[0] // ratio - place[2 if ratio == 4 else 3]
        at = mx.where((place[0] + 1) % ratio == 0, at, -1)
        tails.append((recent.tail, _with_row(each.rows.tail, each.form.pack(row_of)[0], at)))
    return NewRows(normed, _with_row(window.tail, form.pack(row)[0], slot), tails)


def _angles(angles: mx.array, which: int) -> tuple[mx.array, mx.array]:
    return angles[which, 0][None], angles[which, 1][None]


def _with_row(tail: mx.array, row: mx.array, at: mx.array) -> mx.array:
    """The tail with a row in the place of row number `at`, if it has one."""
    here = (mx.arange(len(tail)) == at).reshape(-1, *[1] * (tail.ndim - 1))
    return mx.where(here, row, tail)


def _compressed(
    pooling: Pooling,
    recent: Recent,
    place: mx.array,
    angles: mx.array,
    ratio: int,
    eps: float,
    dtype: mx.Dtype,
) -> mx.array:
    """The row (1, width) that the token completes; something of that shape if it completes none."""
    width, overlaps = len(pooling.norm), ratio == 4
    positions = place[0] + 1 + mx.arange(-2 * ratio if overlaps else -ratio, 0)
    first = place[1] - len(recent.old)
    rows = mx.concatenate(list(recent))[mx.clip(positions - first, 0, None)]
    if overlaps:
        rows = mx.concatenate([rows[:ratio, :, :width], rows[ratio:, :, width:]])
    absent = (positions < 0)[:, None]
    values = mx.where(absent, 0, rows[:, 0])
    scores = mx.where(absent, -mx.inf, rows[:, 1])
    pooled = (mx.softmax(scores, axis=0, precise=True) * values).sum(axis=0)
    row = rms_norm(pooled.astype(dtype)[None], pooling.norm, eps)
    row = rotate(row, _angles(angles, 2 if overlaps else 3))
    return mx.hadamard_transform(row) if pooling.spread else row


def by_kernel(
    kv: Columns,
    latent: Columns,
    kv_norm: mx.array,
    q_norm: mx.array,
    window: Recent,
    poolings: Sequence[Pooling],
    place: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> NewRows:
    """`new_rows` in one launch; see `takes`."""
    ratio, layout, dtype = options["ratio"], options["form"].layout, options["dtype"]
    products, tokens = kv.array, len(kv.array) if options["latents"] else 0
    inputs = [products, kv_norm, window.tail, place, angles, *([q_norm] if tokens else [])]
    outputs = [(window.tail.shape, window.tail.dtype)]
    outputs += [((tokens, latent.width), dtype)] if tokens else []
    numbers: dict[str, Any] = {
        "T": dtype,
        "GROUPS": GROUPS,
        "EPS": bits(options["eps"]),
        "RATIO": ratio,
        "ANGLES": 1 if ratio else 0,
        "ROPE": 2 * angles.shape[-1],
        "WIDTH": layout.width,
        "RANK": latent.width,
        "ALL": products.shape[1],
        "KV_AT": kv.begin,
        "LATENT_AT": latent.begin,
        "CODED": layout.coded,
        "HEAD": layout.head,
        "SPAN": len(window.tail),
        "WINDOW_WORDS": _words(window.tail),
        "MOST": max([layout.width, *(len(each.norm) for each in poolings)]),
    }
    for i, each in enumerate(poolings):
        inputs += [each.ape, each.norm, *each.recent, each.rows.tail]
        outputs += [(t.shape, t.dtype) for t in (each.recent.tail, each.rows.tail)]
        own = len(each.norm), len(each.recent.old), len(each.rows.tail)
        own += (
            _words(each.recent.tail),
            _words(each.rows.tail),
            each.values.begin,
            each.scores.begin,
        )
        names = ("WIDTH", "KEEP", "TAIL", "RECENT_WORDS", "ROW_WORDS", "VALUES_AT", "SCORES_AT")
        numbers |= {f"{name}{i}": number for name, number in zip(names, own, strict=True)}
    tails = [window.tail, *(t for each in poolings for t in (each.recent.tail, each.rows.tail))]
    piece = WORDS * 32 * GROUPS
    pieces = sum(-(-len(tail) * _words(tail) // piece) for tail in tails)
    kinds = tuple((each.form.layout.kind, each.spread) for each in poolings)
    window_out, *rest = kernel(ratio, layout.kind, kinds, tokens > 0)(
        inputs,
        outputs,
        groups=(len(poolings) + 1 + tokens + pieces, 1, 1),
        threads=32 * GROUPS,
        template=list(numbers.items()),
    )
    latents = rest.pop(0) if tokens else None
    return NewRows(latents, window_out, list(zip(rest[::2], rest[1::2], strict=True)))


def _words(rows: mx.array) -> int:
    """Words of 32 bits of a row of a tail."""
    return rows[0].size * rows.dtype.size // 4
