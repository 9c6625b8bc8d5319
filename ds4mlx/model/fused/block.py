"""A block as launches: attention and MoE, each inside a hyper-connection."""

from collections.abc import Sequence

import mlx.core as mx

from ds4mlx.custom_kernels.layer.after import After, Beside
from ds4mlx.custom_kernels.layer.buffers import Held
from ds4mlx.custom_kernels.layer.carried import Carried
from ds4mlx.custom_kernels.products.dense_hyper import dense_hyper
from ds4mlx.custom_kernels.products.hyper_dense import Before, hyper_dense
from ds4mlx.custom_kernels.products.routed_hyper import Streams
from ds4mlx.formats import Planes
from ds4mlx.model.block import Block
from ds4mlx.model.fused.attention import attend, product, read_first
from ds4mlx.model.fused.moe import mixture, routing
from ds4mlx.model.fused.seen import merged, shown
from ds4mlx.model.fused.sequences import Sequences
from ds4mlx.model.hyper import HyperConnection
from ds4mlx.model.linear import Matrix, RMSNorm
from ds4mlx.model.taps import inside


def step_block(
    block: Block, carried: Carried, following: mx.array, ids: mx.array, sequences: Sequences
) -> tuple[Carried, list[Held]]:
    """One token of each sequence, ids int (B,), through a block; what their states then hold.

    following: the matrix `fn` of the hyper-connection that comes next.
    """
    site, dtype = block._site, carried.dtype
    carried = shown(carried, site, ("hc_attn.streams",), block.hc_attn.fn)
    first = before(block.hc_attn, block.attn_norm, carried, stored(read_first(block.attn)))
    heads, held = attend(block.attn, first.products, sequences, dtype)
    carried = attended(block, heads, carried, first.after)
    carried = shown(carried, site, ("attn.streams", "hc_ffn.streams"), block.hc_ffn.fn)
    first = before(block.hc_ffn, block.ffn_norm, carried, routing(block.ffn), given=True)
    streams = Streams(carried, first.after, following)
    carried = mixture(block.ffn, first, ids, streams, inside(site, "ffn.out"))
    return shown(carried, site, ("streams",), following), held


def attended(block: Block, heads: mx.array, carried: Carried, after: After | Beside) -> Carried:
    """The streams with what attention gives, of its heads (B, .), and their partial mixes."""
    last, fn = block.attn.wo_b, block.hc_ffn.fn
    seen = inside(block._site, "attn.out")
    if seen is None:
        return dense_hyper(last.format, last.planes, heads, carried, after, fn)
    out = product(last, heads, carried.dtype)
    return merged(carried, seen("attn.out", out), after, fn)


def before(
    site: HyperConnection,
    norm: RMSNorm,
    carried: Carried,
    matrices: Sequence[tuple[str, Planes]],
    given: bool = False,
) -> Before:
    """Products of a sublayer's input with matrices, the weights for what it gives, the input if asked for."""
    config = site._config
    return hyper_dense(
        *(matrices, carried, site.base, site.scale, norm.weight),
        iterations=config.hc_sinkhorn_iters,
        eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
        given=given,
    )


def stored(matrices: Sequence[Matrix]) -> list[tuple[str, Planes]]:
    """Matrices as kernels take them."""
    return [(m.format, m.planes) for m in matrices]
