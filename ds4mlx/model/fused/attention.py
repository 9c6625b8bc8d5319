"""Attention of one block as launches."""

from collections.abc import Sequence

import mlx.core as mx

from ds4mlx.custom_kernels.layer.attention import Read, attention
from ds4mlx.custom_kernels.layer.buffers import Held
from ds4mlx.custom_kernels.layer.index_scores import index_scores
from ds4mlx.custom_kernels.layer.index_select import index_select
from ds4mlx.custom_kernels.layer.rows import NewRows, Pooling, new_rows
from ds4mlx.custom_kernels.products.columns import Columns, side_by_side
from ds4mlx.custom_kernels.products.dense_matvec import dense_matvec
from ds4mlx.model.attention import Attention
from ds4mlx.model.compressed_attention import SparseAttention
from ds4mlx.model.fused.sequences import Sequences, compressors_of
from ds4mlx.model.linear import Matrix
from ds4mlx.state.row_forms import StateForm


def attend(
    attn: Attention, first: mx.array, sequences: Sequences, dtype: mx.Dtype
) -> tuple[mx.array, list[Held]]:
    """The heads (B, .) of tokens of a type, which wo_b takes, and what their states then hold.

    first: products of the tokens with the matrices `read_first`, side by side.
    """
    columns = side_by_side(first, [m.rows for m in read_first(attn)])
    latents, held = extend(attn, columns, sequences, dtype)
    index = [attn.indexer.wq_b] if isinstance(attn, SparseAttention) else []
    queries, *index_queries = products([attn.wq_b, *index], latents)
    chosen = None
    if isinstance(attn, SparseAttention) and sequences.places.selecting is not None:
        chosen = choose(attn, index_queries[0], columns[-1], held, sequences, dtype)
    return grouped(attn, core(attn, queries, held, chosen, sequences, dtype)), held


def read_first(attn: Attention) -> list[Matrix]:
    """The matrices that the tokens themselves are multiplied by."""
    projections = [m for c in compressors_of(attn) for m in (c.wkv, c.wgate)]
    weights = [attn.indexer.weights_proj] if isinstance(attn, SparseAttention) else []
    return [attn.wq_a, attn.wkv, *projections, *weights]


def extend(
    attn: Attention, first: Sequence[Columns], sequences: Sequences, dtype: mx.Dtype
) -> NewRows:
    """The normed query latents, and the states with what the tokens add.

    That is window rows, projections, and the rows that these complete. first: products of x with wq_a
    and wkv, and of each compressor with wkv and wgate.
    """
    forms = StateForm.of(attn._config, dtype, attn.rounding)
    latent, kv, *projections = first
    poolings = []
    for index, compressor in enumerate(compressors_of(attn)):
        values, scores = projections[2 * index : 2 * index + 2]
        form, spread = (forms.index, attn.rounding == "official") if index else (forms.kv, False)
        poolings.append(
            Pooling(values, scores, compressor.ape, compressor.norm.weight, form, spread)
        )
    norms = attn.kv_norm.weight, attn.q_norm.weight
    told = sequences.places.all, sequences.places.angles
    return new_rows(
        *(kv, latent, *norms, poolings, sequences.held, *told),
        ratio=attn.ratio,
        form=forms.kv,
        eps=attn._config.rms_norm_eps,
        dtype=dtype,
    )


def choose(
    attn: SparseAttention,
    queries: Columns,
    weights: Columns,
    held: Sequence[Held],
    sequences: Sequences,
    dtype: mx.Dtype,
) -> mx.array:
    """The rows that the indexer selects for those tokens that select, int32 (S, topk).

    queries (B, heads * width) and weights (B, heads): products. held: states with the tokens.
    """
    _, selecting, angles = sequences.places
    assert selecting is not None
    rows = [
        own.poolings[1][1] for own, selects in zip(held, sequences.selects, strict=True) if selects
    ]
    scores = index_scores(
        *(queries, weights, rows, selecting, angles),
        heads=attn.indexer.heads,
        form=StateForm.of(attn._config, dtype, attn.rounding).index,
        spread=attn.rounding == "official",
        dtype=dtype,
    )
    return index_select(scores, selecting, topk=attn.indexer.topk)


def core(
    attn: Attention,
    queries: Columns,
    held: Sequence[Held],
    chosen: mx.array | None,
    sequences: Sequences,
    dtype: mx.Dtype,
) -> mx.array:
    """The core attention of the tokens, their rotary channels turned back: (B, H, c).

    queries (B, H c): products. held: states with the tokens.
    """
    config, reads = attn._config, []
    for own, selects in zip(held, sequences.selects, strict=True):
        rows = own.poolings[0][1] if own.poolings else None
        reads.append(Read(own.window, rows, selects and chosen is not None))
    return attention(
        *(queries, attn.attn_sink, reads, chosen, sequences.places.all, sequences.places.angles),
        ratio=attn.ratio,
        before=config.sliding_window - 1,
        form=StateForm.of(config, dtype, attn.rounding).kv,
        eps=config.rms_norm_eps,
        dtype=dtype,
    )


def grouped(attn: Attention, heads: mx.array) -> mx.array:
    """Heads (B, H, c) -> (B, .): each group of them through its part of wo_a."""
    groups = heads.reshape(len(heads), attn._config.o_groups, -1)
    return product(attn.wo_a, groups, heads.dtype)


def products(matrices: Sequence[Matrix], x: mx.array) -> list[Columns]:
    """Products of x (B, in) with each matrix, as parts of one float32 array."""
    both = dense_matvec([(m.format, m.planes) for m in matrices], x)
    return side_by_side(both, [m.rows for m in matrices])


def product(matrix: Matrix, x: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """That of x (B, in), or (B, groups, in / groups), with one: float32 sums, rounded to a type."""
    return dense_matvec([(matrix.format, matrix.planes)], x, dtype)
