"""The sequences of a step, and what launches are told of each."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from ds4mlx.custom_kernels.layer.buffers import Grown, Recent
from ds4mlx.custom_kernels.layer.rows import NewRows
from ds4mlx.model.attention import Attention, HeavyAttention, SparseAttention
from ds4mlx.model.block import Block
from ds4mlx.model.compressor import Compressor


class Place(NamedTuple):
    """Where a sequence's token stands.

    place: int32 (8,), as `state.tails` makes it. angles: float32 (4, 2, rope / 2), cos and sin: of its
    position, in layers that do not compress and in those that do; and in the latter of the first
    token of the rows of ratio 4 and 128 to which it belongs.
    """

    place: mx.array
    angles: mx.array


class Held(NamedTuple):
    """What a state holds of a layer: its window, and of each compressor projections and rows."""

    window: Recent
    poolings: list[tuple[Recent, Grown]]


class Sequences(NamedTuple):
    """For each sequence its place, what it holds of one layer, and whether it selects rows there."""

    places: Sequence[Place]
    held: Sequence[Held]
    selects: Sequence[bool]


def held_of(arrays: Sequence[mx.array], layers: Sequence[Block]) -> Iterator[Held]:
    """What a state holds of each layer, from `state.tails.arrays_of` it."""
    rest = iter(arrays)
    for layer in layers:
        window = Recent(next(rest), next(rest))
        count = len(compressors_of(layer.attn))
        pairs = (Recent(next(rest), next(rest)) for _ in range(count))
        yield Held(window, [(recent, Grown(next(rest), next(rest))) for recent in pairs])


def tails_of(rows: NewRows) -> list[mx.array]:
    """The new tails of a layer, in the order of its parts."""
    return [rows.window, *(tail for pair in rows.poolings for tail in pair)]


def compressors_of(attn: Attention) -> list[Compressor]:
    """The attention's own compressor, and its indexer's."""
    own = [attn.compressor] if isinstance(attn, HeavyAttention) else []
    return [*own, attn.indexer.compressor] if isinstance(attn, SparseAttention) else own


def row(array: mx.array, number: int) -> mx.array:
    """Sequence `number`'s part of (B, n), (1, n): a view, which an index alone would not give."""
    return array if len(array) == 1 else array[number : number + 1]


def stacked(rows: list[mx.array]) -> mx.array:
    """(B, n) of what each of B sequences has, (1, n)."""
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)
