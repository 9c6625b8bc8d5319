"""Mistakes in attention."""

import mlx.core as mx

from ds4mlx.model import attention
from faults.listing import change, fault, with_ratio


@fault
def no_sink(patch, model):
    change(patch, with_ratio(model, 0, 4, 128), "attn_sink", lambda s: s - mx.inf)


@fault
def sink_scaled_by_the_softmax_scale(patch, model):
    scale = model.args.head_dim**-0.5
    change(patch, with_ratio(model, 0, 4, 128), "attn_sink", lambda s: s * scale)


@fault
def sink_of_another_head(patch, model):
    change(patch, with_ratio(model, 0, 4, 128), "attn_sink", lambda s: mx.roll(s, 1))


def resize_window(patch, model, by):
    config = model.args.model_copy(update={"sliding_window": model.args.sliding_window + by})
    patch.setattr(model, "args", config)
    for attn in with_ratio(model, 0, 4, 128):
        patch.setattr(attn, "_config", config)


@fault
def window_one_key_too_short(patch, model):
    resize_window(patch, model, -1)


@fault
def window_one_key_too_long(patch, model):
    resize_window(patch, model, 1)


def revise_visibility(patch, rule):
    patch.setattr(
        attention,
        "visible_rows",
        lambda p, rows, ratio: rule(mx.arange(rows), p[:, None], ratio),
    )


@fault
def row_visible_one_token_late(patch, model):
    revise_visibility(patch, lambda j, t, m: j < t // m)


@fault
def row_visible_one_group_late(patch, model):
    revise_visibility(patch, lambda j, t, m: j < (t + 1) // m - 1)


@fault
def row_visible_before_its_group_is_complete(patch, model):
    revise_visibility(patch, lambda j, t, m: j < (t + 2) // m)


@fault
def rows_of_the_window_region_hidden(patch, model):
    window = model.args.sliding_window
    revise_visibility(patch, lambda j, t, m: (j < (t + 1) // m) & ((j + 1) * m - 1 <= t - window))


@fault
def hca_rows_missing(patch, model):
    revise_visibility(patch, lambda j, t, m: (j < (t + 1) // m) & (m != 128))


@fault
def no_rms_of_the_query_heads(patch, model):
    patch.setattr(attention, "rms_norm", lambda x, weight, eps: x)


@fault
def kv_norm_weight_ignored(patch, model):
    norms = [a.kv_norm for a in with_ratio(model, 0, 4, 128)]
    change(patch, norms, "weight", mx.ones_like)


@fault
def norm_weights_applied_as_one_plus_w(patch, model):
    change(patch, [b.attn_norm for b in model.layers], "weight", lambda w: w + 1)


@fault
def softmax_scale_from_the_plain_channels(patch, model):
    attend, plain = attention.sink_attention, model.args.head_dim - model.args.qk_rope_head_dim
    patch.setattr(attention, "sink_attention", lambda q, s, k, *_: attend(q, s, k, plain**-0.5))


@fault
def heads_grouped_in_the_other_order(patch, model):
    output, groups = attention.Attention.output, model.args.o_groups

    def interleaved(self, out):
        n, h, c = out.shape
        return output(self, mx.swapaxes(out.reshape(n, h // groups, groups, c), 1, 2))

    patch.setattr(attention.Attention, "output", interleaved)
