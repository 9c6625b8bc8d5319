"""Mistakes with hyper-connections."""

import mlx.core as mx

from ds4mlx.custom_kernels.layer import hyper_pre
from ds4mlx.model import hyper
from faults.listing import fault


@fault
def comb_transposed(patch, model):
    merge = hyper.HyperConnection.merge
    patch.setattr(
        hyper.HyperConnection,
        "merge",
        lambda self, s, out, post, comb: merge(self, s, out, post, mx.swapaxes(comb, -1, -2)),
    )


@fault
def post_without_the_factor_two(patch, model):
    before = hyper.HyperConnection.before

    def halved(self, *arguments):
        out, post, comb = before(self, *arguments)
        return out, post / 2, comb

    patch.setattr(hyper.HyperConnection, "before", halved)


@fault
def streams_in_reverse_order(patch, model):
    project = hyper_pre.project
    patch.setattr(hyper_pre, "project", lambda s, fn, eps: project(s[..., ::-1, :], fn, eps))


@fault
def streams_flattened_channel_major(patch, model):
    project = hyper_pre.project
    patch.setattr(
        hyper_pre,
        "project",
        lambda s, fn, eps: project(mx.swapaxes(s, -1, -2).reshape(s.shape), fn, eps),
    )


@fault
def one_sinkhorn_iteration(patch, model):
    sinkhorn = hyper_pre.sinkhorn
    patch.setattr(hyper_pre, "sinkhorn", lambda logits, n, eps: sinkhorn(logits, 1, eps))


@fault
def sinkhorn_rows_and_columns_swapped(patch, model):
    sinkhorn = hyper_pre.sinkhorn
    patch.setattr(
        hyper_pre,
        "sinkhorn",
        lambda c, n, eps: mx.swapaxes(sinkhorn(mx.swapaxes(c, -1, -2), n, eps), -1, -2),
    )


@fault
def no_rms_before_the_projection(patch, model):
    patch.setattr(hyper_pre, "project", lambda s, fn, eps: s.astype(mx.float32).flatten(-2) @ fn.T)


@fault
def head_takes_the_mean_of_the_streams(patch, model):
    patch.setattr(hyper.HyperHead, "__call__", lambda self, streams: streams.mean(-2))
