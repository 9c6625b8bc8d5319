"""The sequences of a step, and what launches are told of each."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from ds4mlx.custom_kernels.layer.buffers import Grown, Recent
from ds4mlx.custom_kernels.layer.rows import NewRows
from ds4mlx.model.attention import Attention
from ds4mlx.model.block import Block
from ds4mlx.model.compressed_attention import HeavyAttention, SparseAttention
from ds4mlx.model.compressor import Compressor


class Held(NamedTuple):
    """What a state holds of a layer: its window, and of each compressor projections and rows."""

    window: Recent
    poolings: list[tuple[Recent, Grown]]


class Places(NamedTuple):
    """Where the tokens of a step stand.

    one: of each int32 (8,), as `state.tails` makes it, its number, and that among those that select rows,
    or -1. all: the same, int32 (B, 8). selecting: those that select, (S, 8), or None. angles: float32
    (B, 4, 2, rope / 2), cos and sin: of a token's position, in layers that do not compress and in those
    that do; and in the latter of the first token of the rows of ratio 4 and 128 to which it belongs.
    """

    one: Sequence[mx.array]
    all: mx.array
    selecting: mx.array | None
    angles: mx.array


class Sequences(NamedTuple):
    """Of the sequences of a step: where their tokens stand, and what they hold of one layer.

    selects: whether each selects rows there.
    """

    places: Places
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
