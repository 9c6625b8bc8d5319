"""A block as launches: attention and MoE, each inside a hyper-connection."""

from typing import NamedTuple

import mlx.core as mx

from ds4mlx.custom_kernels.layer.buffers import Held
from ds4mlx.custom_kernels.layer.hyper_in import hyper_in
from ds4mlx.custom_kernels.layer.hyper_out import hyper_out
from ds4mlx.model.block import Block
from ds4mlx.model.fused.attention import attend
from ds4mlx.model.fused.moe import mixture
from ds4mlx.model.fused.sequences import Sequences
from ds4mlx.model.hyper import HyperConnection
from ds4mlx.model.linear import RMSNorm


class Carried(NamedTuple):
    """What goes from one sublayer to the next.

    streams (B, n, D); partial float32 (B, P, .): sums over slices of the streams of what the next
    hyper-connection's mixes are made of.
    """

    streams: mx.array
    partial: mx.array


def step_block(
    block: Block, carried: Carried, following: mx.array, ids: mx.array, sequences: Sequences
) -> tuple[Carried, list[Held]]:
    """One token of each sequence, ids int (B,), through a block; what their states then hold.

    following: the matrix `fn` of the hyper-connection that comes next.
    """
    x, post, comb = before(block.hc_attn, block.attn_norm, carried)
    out, held = attend(block.attn, x, sequences)
    carried = Carried(*hyper_out(carried.streams, [out], post, comb, block.hc_ffn.fn))
    x, post, comb = before(block.hc_ffn, block.ffn_norm, carried)
    outs = mixture(block.ffn, x, ids)
    return Carried(*hyper_out(carried.streams, outs, post, comb, following)), held


def before(
    site: HyperConnection, norm: RMSNorm, carried: Carried
) -> tuple[mx.array, mx.array, mx.array]:
    """A sublayer's input (B, D), normed, and the weights post and comb for what it gives."""
    config = site._config
    return hyper_in(
        *(carried.streams, carried.partial, site.base, site.scale, norm.weight),
        iterations=config.hc_sinkhorn_iters,
        eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
    )
