"""Mistakes in compressors and the indexer."""

import mlx.core as mx

from ds4mlx.model import compressed_attention, indexer
from ds4mlx.model.compressor import Compressor
from faults.listing import change, fault, with_ratio


@fault
def no_overlap_with_the_previous_group(patch, model):
    groups = Compressor.groups

    def alone(self, recent, first, last):
        candidates = groups(self, recent, first, last)
        return candidates[:, self.ratio :] if self.overlaps else candidates

    patch.setattr(Compressor, "groups", alone)


@fault
def lanes_swapped(patch, model):
    project = Compressor.project

    def swapped(self, x, positions):
        lanes = project(self, x, positions)
        return mx.roll(lanes, self.width, axis=-1) if self.overlaps else lanes

    patch.setattr(Compressor, "project", swapped)


@fault
def two_softmaxes_averaged(patch, model):
    pool = Compressor.pool

    def halves(self, candidates):
        if not self.overlaps:
            return pool(self, candidates)
        first, second = mx.split(candidates, 2, axis=1)
        first = mx.where(mx.isinf(first), 0.0, first)
        return (pool(self, first) + pool(self, second)) / 2

    patch.setattr(Compressor, "pool", halves)


@fault
def first_group_averages_four_zero_rows(patch, model):
    patch.setattr(
        Compressor,
        "nothing",
        lambda self: mx.zeros((self.ratio, 2, 2 * self.width)),
    )


@fault
def no_position_bias(patch, model):
    modules = [a.compressor for a in with_ratio(model, 4, 128)]
    change(patch, modules, "ape", mx.zeros_like)


@fault
def position_bias_by_place_in_the_chunk(patch, model):
    project = Compressor.project
    patch.setattr(Compressor, "project", lambda self, x, p: project(self, x, p - p[0] + 1))


@fault
def norm_of_compressed_rows_skipped(patch, model):
    for attn in with_ratio(model, 4, 128):
        patch.setitem(attn.compressor, "norm", lambda rows: rows)


def indexers(model):
    return [a.indexer for a in with_ratio(model, 4)]


@fault
def indexer_off(patch, model):
    for module in indexers(model):
        patch.setattr(module, "topk", 1 << 20)


@fault
def indexer_keeps_one_row_too_few(patch, model):
    for module in indexers(model):
        patch.setattr(module, "topk", module.topk - 1)


@fault
def indexer_keeps_the_most_recent_rows(patch, model):
    select = indexer.Indexer.select
    patch.setattr(
        indexer.Indexer,
        "select",
        lambda self, s, v: select(self, mx.broadcast_to(mx.arange(s.shape[-1]), s.shape), v),
    )


@fault
def indexer_without_relu(patch, model):
    def linear(self, q, weights, rows, form, scratch):
        return mx.einsum("lhd,rd,lh->lr", q, rows, weights)

    patch.setattr(indexer.Indexer, "scores", linear)


@fault
def indexer_head_weights_absolute(patch, model):
    weights = indexer.Indexer.head_weights
    patch.setattr(indexer.Indexer, "head_weights", lambda self, x: mx.abs(weights(self, x)))


@fault
def indexer_queries_not_rotated(patch, model):
    patch.setattr(indexer, "rotate", lambda x, angles: x)


@fault
def indexer_reads_unnormed_query_latent(patch, model):
    contexts = compressed_attention.SparseAttention.contexts
    patch.setattr(
        compressed_attention.SparseAttention,
        "contexts",
        lambda self, x, qr, batch, states: contexts(self, x, self.wq_a(x), batch, states),
    )
