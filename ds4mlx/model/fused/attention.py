"""Attention of one block as launches."""

from collections.abc import Sequence

import mlx.core as mx

from ds4mlx.custom_kernels.layer.attention import attention
from ds4mlx.custom_kernels.layer.buffers import Grown, Recent
from ds4mlx.custom_kernels.layer.index_scores import index_scores
from ds4mlx.custom_kernels.layer.index_select import index_select
from ds4mlx.custom_kernels.layer.rows import NewRows, Pooling, new_rows
from ds4mlx.custom_kernels.products.dense_matvec import dense_matvec
from ds4mlx.model.attention import Attention, SparseAttention
from ds4mlx.model.fused.sequences import Held, Place, Sequences, compressors_of, row, stacked
from ds4mlx.model.linear import Matrix
from ds4mlx.state.row_forms import StateForm


def attend(attn: Attention, x: mx.array, sequences: Sequences) -> tuple[mx.array, list[NewRows]]:
    """The output float32 (B, D) for the tokens x (B, D), and what each adds to its state."""
    projections = [m for c in compressors_of(attn) for m in (c.wkv, c.wgate)]
    weights, index = [], []
    if isinstance(attn, SparseAttention):
        weights, index = [attn.indexer.weights_proj], [attn.indexer.wq_b]
    latents, kvs, *rest = dense([attn.wq_a, attn.wkv, *projections, *weights], x)
    made = []
    for number, (held, place) in enumerate(zip(sequences.held, sequences.places, strict=True)):
        own = [row(each, number) for each in (latents, kvs, *rest)]
        made.append(extend(attn, own[0], own[1], own[2:], held, place, x.dtype))
    queries = dense([attn.wq_b, *index], stacked([rows.latent for rows in made]))
    outs = []
    for number, rows in enumerate(made):
        q, *index_q = (row(each, number) for each in queries)
        held, place = sequences.held[number], sequences.places[number]
        grown = [
            Grown(h.full, t) for (_, h), (_, t) in zip(held.poolings, rows.poolings, strict=True)
        ]
        chosen = None
        if sequences.selects[number] and isinstance(attn, SparseAttention):
            chosen = choose(attn, index_q[0], row(rest[-1], number), grown[1], place, x.dtype)
        window = Recent(held.window.old, rows.window)
        outs.append(core(attn, q, window, grown[0] if grown else None, chosen, place, x.dtype))
    return output(attn, outs), made


def extend(
    attn: Attention,
    latent: mx.array,
    kv: mx.array,
    projections: Sequence[mx.array],
    held: Held,
    place: Place,
    dtype: mx.Dtype,
) -> NewRows:
    """What a token adds: its window row, its projections, and the rows that it completes.

    latent (rank,), kv (c,), and of each compressor values and scores (channels,): products.
    """
    forms = StateForm.of(attn._config, dtype, attn.rounding)
    poolings = []
    for number, (compressor, (recent, rows)) in enumerate(
        zip(compressors_of(attn), held.poolings, strict=True)
    ):
        values, scores = projections[2 * number : 2 * number + 2]
        form, spread = (forms.index, attn.rounding == "official") if number else (forms.kv, False)
        weights = compressor.ape, compressor.norm.weight
        poolings.append(Pooling(values, scores, *weights, recent, rows, form, spread))
    return new_rows(
        *(kv, latent, attn.kv_norm.weight, attn.q_norm.weight, held.window, poolings, *place),
        ratio=attn.ratio,
        form=forms.kv,
        eps=attn._config.rms_norm_eps,
        dtype=dtype,
    )


def choose(
    attn: SparseAttention,
    queries: mx.array,
    weights: mx.array,
    rows: Grown,
    place: Place,
    dtype: mx.Dtype,
) -> mx.array:
    """The rows that the indexer selects for a token, int32 (topk,).

    queries (heads * width,) and weights (heads,): products.
    """
    scores = index_scores(
        *(queries, weights, rows, *place),
        heads=attn.indexer.heads,
        form=StateForm.of(attn._config, dtype, attn.rounding).index,
        spread=attn.rounding == "official",
        dtype=dtype,
    )
    return index_select(scores, place.place, topk=attn.indexer.topk)


def core(
    attn: Attention,
    queries: mx.array,
    window: Recent,
    rows: Grown | None,
    chosen: mx.array | None,
    place: Place,
    dtype: mx.Dtype,
) -> mx.array:
    """The core attention of a token, its rotary channels turned back: (H, c).

    queries (H c,): products. `window` and `rows` hold what the token has added.
    """
    config = attn._config
    return attention(
        *(queries, attn.attn_sink, window, rows, chosen, *place),
        ratio=attn.ratio,
        before=config.sliding_window - 1,
        form=StateForm.of(config, dtype, attn.rounding).kv,
        eps=config.rms_norm_eps,
        dtype=dtype,
    )


def output(attn: Attention, outs: list[mx.array]) -> mx.array:
    """B times heads (H, c) -> float32 (B, D): each group of heads through wo_a, all through wo_b."""
    count, groups = len(outs), attn._config.o_groups
    (low,) = dense([attn.wo_a], stacked(outs).reshape(count, groups, -1), outs[0].dtype)
    (final,) = dense([attn.wo_b], low.reshape(count, -1))
    return final


def dense(matrices: Sequence[Matrix], x: mx.array, dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    """Products of x (B, in), or (B, groups, in), with each matrix: float32 sums, rounded to a type."""
    return dense_matvec([(m.format, m.planes) for m in matrices], x, dtype)
