"""The sequences of a step, and what launches are told of each."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ds4mlx.custom_kernels.layer.buffers import Held
from ds4mlx.model.attention import Attention
from ds4mlx.model.compressed_attention import HeavyAttention, SparseAttention
from ds4mlx.model.compressor import Compressor


class Places(NamedTuple):
    """Where the tokens of a step stand.

    all: of each, as `state.tails` makes it, its number, and that among those that select rows, or -1:
    int32 (B, 8). selecting: those that select, (S, 8), or None. angles: float32
    (B, 4, 2, rope / 2), cos and sin: of a token's position, in layers that do not compress and in those
    that do; and in the latter of the first token of the rows of ratio 4 and 128 to which it belongs.
    """

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


def compressors_of(attn: Attention) -> list[Compressor]:
    """The attention's own compressor, and its indexer's."""
    own = [attn.compressor] if isinstance(attn, HeavyAttention) else []
    return [*own, attn.indexer.compressor] if isinstance(attn, SparseAttention) else own
