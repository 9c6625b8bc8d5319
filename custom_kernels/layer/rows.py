"""What one decoded token of each of a few sequences adds to a layer's states, in a launch or two.

The row of its window; for each compressor the token's projection, and the compressed row that it
completes, if it does. Tails come back whole, with the token in them. The first launch also norms the
query latents of all tokens of the step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.layer.buffers import Grown, Held, Recent, filled, joined
from ds4mlx.custom_kernels.layer.plain import rms_norm, rotate
from ds4mlx.custom_kernels.layer.row_layout import Form, RowLayout
from ds4mlx.custom_kernels.layer.rows_text import WORDS, kernel
from ds4mlx.custom_kernels.products.columns import Columns

TOGETHER = 4  # sequences of a launch: of more, their arrays would be more than Metal takes
RATIOS = (0, 4, 128)
GROUPS = 16  # SIMD-groups of a threadgroup; of 32, a GPU's registers would just suffice to pool
KV_GROUP, INDEX_GROUP = 64, 32  # channels that share an exponent


class Pooling(NamedTuple):
    """One compressor, that of the KV rows or the indexer's.

    `channels` is twice the width for ratio 4, and the width for ratio 128.
    """

    values: Columns  # float32 (N, channels): products of its wkv with x
    scores: Columns  # float32 (N, channels): products of its wgate with x, without the bias
    ape: mx.array  # (ratio, channels): bias of a token's place in its group
    norm: mx.array  # (width,): weight of its RMSNorm
    form: Form  # how its rows lie
    spread: bool  # whether they are Hadamard-transformed


class NewRows(NamedTuple):
    """The query latents, and what the states hold with the tokens in their tails."""

    latents: mx.array  # (N, rank), normed
    held: list[Held]


class Options(TypedDict):
    """What a layer is, and its activations; see `new_rows`."""

    ratio: int
    form: Form
    eps: float
    dtype: mx.Dtype


def new_rows(
    kv: Columns,
    latent: Columns,
    kv_norm: mx.array,
    q_norm: mx.array,
    poolings: Sequence[Pooling],
    held: Sequence[Held],
    places: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> NewRows:
    """What tokens add to a layer of a ratio (0, 4, 128), each to the state of its sequence.

    kv (N, width) and latent (N, rank) float32: products of wkv and wq_a with x of the N tokens of a step,
    read as `dtype`, which all activations have. kv_norm, q_norm: weights. held: what states hold of the
    layer; of each poolings as many and in the order of `poolings`, projections as float32
    (rows, 2, channels). The window's rows lie as `form` says. places int32 (S, 8), of each state: the
    token's position, the position at which tails begin, the rows before the tails of ratio 4 and 128, and
    which of the N tokens it is. angles float32 (N, 4, 2, rope / 2), of each: cos and sin for the window
    row of a layer of ratio 0, of the others, and for a row of ratio 4 and 128. A tail of rows has room
    for the row that the token completes; where it completes none, it stays as it is.
    """
    own = kv, latent, kv_norm, q_norm, poolings, held, places, angles
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
    poolings: Sequence[Pooling],
    held: Sequence[Held],
    places: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> NewRows:
    """`new_rows` by MLX's own operations."""
    normed = rms_norm(latent.value.astype(options["dtype"]), q_norm, options["eps"])
    made = []
    for state, place in zip(held, places, strict=True):
        turns = angles[place[4]]
        tails = [_window_tail(kv, kv_norm, state.window, place, turns, options)]
        for pooling, (recent, rows) in zip(poolings, state.poolings, strict=True):
            tails += _pooled_tails(pooling, recent, rows, place, turns, options)
        made.append(state.after(joined(tails)[0].array))
    return NewRows(normed, made)


def _window_tail(
    kv: Columns,
    norm: mx.array,
    window: Recent,
    place: mx.array,
    angles: mx.array,
    options: Options,
) -> mx.array:
    """The window's tail with the row of a token."""
    ratio, form = options["ratio"], options["form"]
    row = rms_norm(kv.value[place[4]].astype(options["dtype"])[None], norm, options["eps"])
    row = rotate(row, _angles(angles, 1 if ratio else 0))
    return _with_row(window.tail.value, form.pack(row)[0], place[0] - place[1])


def _pooled_tails(
    pooling: Pooling,
    recent: Recent,
    rows: Grown,
    place: mx.array,
    angles: mx.array,
    options: Options,
) -> list[mx.array]:
    """A compressor's tails, of projections and of rows, with what a token adds to them."""
    ratio, number = options["ratio"], place[4]
    scores = pooling.scores.value[number] + pooling.ape[place[0] % ratio]
    projected = mx.stack([pooling.values.value[number], scores])
    projections = _with_row(recent.tail.value, projected, place[0] - place[1])
    row = _compressed(pooling, recent.old, projections, place, angles, options)
    # A row that is not complete is put where there is none.
    at = place[0] // ratio - place[2 if ratio == 4 else 3]
    at = mx.where((place[0] + 1) % ratio == 0, at, -1)
    return [projections, _with_row(rows.tail.value, pooling.form.pack(row)[0], at)]


def _angles(angles: mx.array, which: int) -> tuple[mx.array, mx.array]:
    return angles[which, 0][None], angles[which, 1][None]


def _with_row(tail: mx.array, row: mx.array, at: mx.array) -> mx.array:
    """The tail with a row in the place of row number `at`, if it has one."""
    here = (mx.arange(len(tail)) == at).reshape(-1, *[1] * (tail.ndim - 1))
    return mx.where(here, row, tail)


def _compressed(
    pooling: Pooling,
    old: mx.array,
    newer: mx.array,
    place: mx.array,
    angles: mx.array,
    options: Options,
) -> mx.array:
    """The row (1, width) that the token completes; something of that shape if it completes none.

    old, newer: projections before the position at which tails begin, and from it on.
    """
    ratio, width = options["ratio"], len(pooling.norm)
    overlaps = ratio == 4
    positions = place[0] + 1 + mx.arange(-2 * ratio if overlaps else -ratio, 0)
    first = place[1] - len(old)
    rows = mx.concatenate([old, newer])[mx.clip(positions - first, 0, None)]
    if overlaps:
        rows = mx.concatenate([rows[:ratio, :, :width], rows[ratio:, :, width:]])
    absent = (positions < 0)[:, None]
    values = mx.where(absent, 0, rows[:, 0])
    scores = mx.where(absent, -mx.inf, rows[:, 1])
    pooled = (mx.softmax(scores, axis=0, precise=True) * values).sum(axis=0)
    row = rms_norm(pooled.astype(options["dtype"])[None], pooling.norm, options["eps"])
    row = rotate(row, _angles(angles, 2 if overlaps else 3))
    return mx.hadamard_transform(row) if pooling.spread else row


def by_kernel(
    kv: Columns,
    latent: Columns,
    kv_norm: mx.array,
    q_norm: mx.array,
    poolings: Sequence[Pooling],
    held: Sequence[Held],
    places: mx.array,
    angles: mx.array,
    **options: Unpack[Options],
) -> NewRows:
    """`new_rows` in a launch for every TOGETHER sequences; see `takes`."""
    norms = [kv_norm, q_norm], [each.ape for each in poolings], [each.norm for each in poolings]
    inputs = [kv.array, places, angles, *(weight for each in norms for weight in each)]
    common = _common(kv, latent, poolings, held[0], angles, options)
    latents, made = None, []
    for first in range(0, len(held), TOGETHER):
        some, tokens = held[first : first + TOGETHER], 0 if first else len(kv.array)
        outputs = _launched(inputs, poolings, some, tokens, [*common, ("FIRST", first)], options)
        latents = latents if first else outputs.pop(0)
        made += [own.after(tails) for own, tails in zip(some, outputs, strict=False)]
    assert latents is not None
    return NewRows(latents, made)


def _launched(
    inputs: list[mx.array],
    poolings: Sequence[Pooling],
    held: Sequence[Held],
    tokens: int,
    template: list[tuple[str, Any]],
    options: Options,
) -> list[mx.array]:
    """The tails of some states, after the query latents of so many tokens, if of any.

    As many states as the launch is written for: those that lack are the first once more.
    """
    given, rank = filled(held), dict(template)["RANK"]
    kinds = tuple((each.form.layout.kind, each.spread) for each in poolings)
    lying = [
        array
        for each in given
        for array in (each.array, *(recent.old for recent, _ in each.poolings))
    ]
    outputs = [((tokens, rank), options["dtype"])] if tokens else []
    outputs += [(own.array.shape, mx.uint32) for own in given]
    pieces = sum(-(-tail.form.room // (WORDS * 32 * GROUPS)) for tail in held[0].tails)
    return kernel(options["ratio"], options["form"].layout.kind, kinds, tokens > 0, len(given))(
        [*inputs, *lying],
        outputs,
        groups=(len(poolings) + 1 + tokens + pieces, len(given), 1),
        threads=32 * GROUPS,
        template=template,
    )


def _common(
    kv: Columns,
    latent: Columns,
    poolings: Sequence[Pooling],
    held: Held,
    angles: mx.array,
    options: Options,
) -> list[tuple[str, Any]]:
    """What the text of a launch is told of a layer."""
    layout, window = options["form"].layout, held.window.tail
    numbers: dict[str, Any] = {
        "T": options["dtype"],
        "GROUPS": GROUPS,
        "EPS": bits(options["eps"]),
        "RATIO": options["ratio"],
        "ANGLES": 1 if options["ratio"] else 0,
        "ROPE": 2 * angles.shape[-1],
        "WIDTH": layout.width,
        "RANK": latent.width,
        "ALL": kv.array.shape[1],
        "KV_AT": kv.begin,
        "LATENT_AT": latent.begin,
        "CODED": layout.coded,
        "HEAD": layout.head,
        "WINDOW_AT": window.begin,
        "WINDOW_ROOM": window.form.room,
        "WINDOW_WORDS": window.row_words,
        "MOST": max([layout.width, *(len(each.norm) for each in poolings)]),
    }
    for i, (each, (recent, rows)) in enumerate(zip(poolings, held.poolings, strict=True)):
        numbers |= {
            f"WIDTH{i}": len(each.norm),
            f"KEEP{i}": len(recent.old),
            f"RECENT_AT{i}": recent.tail.begin,
            f"RECENT_ROOM{i}": recent.tail.form.room,
            f"RECENT_WORDS{i}": recent.tail.row_words,
            f"ROWS_AT{i}": rows.tail.begin,
            f"ROWS_ROOM{i}": rows.tail.form.room,
            f"ROW_WORDS{i}": rows.tail.row_words,
            f"VALUES_AT{i}": each.values.begin,
            f"SCORES_AT{i}": each.scores.begin,
        }
    return list(numbers.items())
