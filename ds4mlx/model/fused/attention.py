"""Attention of one block as launches."""

from collections.abc import Sequence

import mlx.core as mx

from ds4mlx.custom_kernels.layer.attention import Read, attention
from ds4mlx.custom_kernels.layer.buffers import Grown, Recent
from ds4mlx.custom_kernels.layer.index_scores import index_scores
from ds4mlx.custom_kernels.layer.index_select import index_select
from ds4mlx.custom_kernels.layer.rows import NewRows, Pooling, new_rows
from ds4mlx.custom_kernels.products.columns import Columns, side_by_side
from ds4mlx.custom_kernels.products.dense_matvec import dense_matvec
from ds4mlx.model.attention import Attention, SparseAttention
from ds4mlx.model.fused.sequences import Sequences, compressors_of
from ds4mlx.model.linear import Matrix
from ds4mlx.state.row_forms import StateForm


def attend(attn: Attention, x: mx.array, sequences: Sequences) -> tuple[mx.array, list[NewRows]]:
    """The output float32 (B, D) for the tokens x (B, D), and what each adds to its state."""
    projections = [m for c in compressors_of(attn) for m in (c.wkv, c.wgate)]
    weights, index = [], []
    if isinstance(attn, SparseAttention):
        weights, index = [attn.indexer.weights_proj], [attn.indexer.wq_b]
    first = products([attn.wq_a, attn.wkv, *projections, *weights], x)
    numbers = range(len(sequences.places))
    made = [extend(attn, first, sequences, number, x.dtype) for number in numbers]
    assert made[0].latents is not None
    queries, *index_queries = products([attn.wq_b, *index], made[0].latents)
    reads = []
    for number, rows in enumerate(made):
        indexed = (index_queries[0], first[-1]) if sequences.selects[number] and index else None
        reads.append(read_of(attn, rows, indexed, sequences, number, x.dtype))
    return output(attn, core(attn, queries, reads, sequences.angles, x.dtype)), made


def read_of(
    attn: Attention,
    rows: NewRows,
    indexed: tuple[Columns, Columns] | None,
    sequences: Sequences,
    number: int,
    dtype: mx.Dtype,
) -> Read:
    """What a token reads, once its rows are in.

    indexed: the indexer's queries and weights of all tokens, where this one selects rows.
    """
    held, place = sequences.held[number], sequences.places[number]
    grown = [
        Grown(h.full, tail) for (_, h), (_, tail) in zip(held.poolings, rows.poolings, strict=True)
    ]
    chosen = None
    if indexed and isinstance(attn, SparseAttention):
        chosen = choose(attn, *indexed, grown[1], place, sequences.angles, dtype)
    return Read(Recent(held.window.old, rows.window), grown[0] if grown else None, chosen, place)


def extend(
    attn: Attention, first: Sequence[Columns], sequences: Sequences, number: int, dtype: mx.Dtype
) -> NewRows:
    """What a token adds: its window row, its projections, and the rows that it completes.

    first: products of x with wq_a and wkv, and of each compressor with wkv and wgate. The first token's
    launch also norms the query latents of all.
    """
    forms, held = StateForm.of(attn._config, dtype, attn.rounding), sequences.held[number]
    latent, kv, *projections = first
    poolings = []
    for index, (compressor, (recent, rows)) in enumerate(
        zip(compressors_of(attn), held.poolings, strict=True)
    ):
        values, scores = projections[2 * index : 2 * index + 2]
        form, spread = (forms.index, attn.rounding == "official") if index else (forms.kv, False)
        weights = compressor.ape, compressor.norm.weight
        poolings.append(Pooling(values, scores, *weights, recent, rows, form, spread))
    norms = attn.kv_norm.weight, attn.q_norm.weight
    told = sequences.places[number], sequences.angles
    return new_rows(
        *(kv, latent, *norms, held.window, poolings, *told),
        ratio=attn.ratio,
        form=forms.kv,
        eps=attn._config.rms_norm_eps,
        dtype=dtype,
        latents=number == 0,
    )


def choose(
    attn: SparseAttention,
    queries: Columns,
    weights: Columns,
    rows: Grown,
    place: mx.array,
    angles: mx.array,
    dtype: mx.Dtype,
) -> mx.array:
    """The rows that the indexer selects for a token, int32 (topk,).

    queries (B, heads * width) and weights (B, heads): products.
    """
    scores = index_scores(
        *(queries, weights, rows, place, angles),
        heads=attn.indexer.heads,
        form=StateForm.of(attn._config, dtype, attn.rounding).index,
        spread=attn.rounding == "official",
        dtype=dtype,
    )
    return index_select(scores, place, topk=attn.indexer.topk)


def core(
    attn: Attention, queries: Columns, reads: Sequence[Read], angles: mx.array, dtype: mx.Dtype
) -> mx.array:
    """The core attention of the tokens, their rotary channels turned back: (B, H, c).

    queries (B, H c): products. `reads` hold what the tokens have added.
    """
    config = attn._config
    return attention(
        *(queries, attn.attn_sink, reads, angles),
        ratio=attn.ratio,
        before=config.sliding_window - 1,
        form=StateForm.of(config, dtype, attn.rounding).kv,
        eps=config.rms_norm_eps,
        dtype=dtype,
    )


def output(attn: Attention, heads: mx.array) -> mx.array:
    """Heads (B, H, c) -> float32 (B, D): each group of heads through wo_a, all through wo_b."""
    groups = heads.reshape(len(heads), attn._config.o_groups, -1)
    return product(attn.wo_b, product(attn.wo_a, groups, heads.dtype))


def products(matrices: Sequence[Matrix], x: mx.array) -> list[Columns]:
    """Products of x (B, in) with each matrix, as parts of one float32 array."""
    both = dense_matvec([(m.format, m.planes) for m in matrices], x)
    return side_by_side(both, [m.rows for m in matrices])


def product(matrix: Matrix, x: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """That of x (B, in), or (B, groups, in / groups), with one: float32 sums, rounded to a type."""
    return dense_matvec([(matrix.format, matrix.planes)], x, dtype)
