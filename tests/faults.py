"""Classic mistakes, one function each, seeded into the model by monkeypatching.

A fault takes pytest's `monkeypatch` and the model; its docstring is its name in reports.
"""

import mlx.core as mx

from ds4mlx import attention, compressor, hyper, indexer, moe
from ds4mlx.compressor import Compressor
from ds4mlx.rope import Rotary, rotate

FAULTS = []
STORAGE_FAULTS = []  # those of them that need the weights in their stored form


def fault(function):
    """Put a function on the list."""
    FAULTS.append(function)
    return function


def storage_fault(function):
    """Put a function on both lists."""
    STORAGE_FAULTS.append(function)
    return fault(function)


def with_ratio(model, *ratios):
    """The attention modules of the layers with one of these ratios."""
    return [b.attn for b in model.layers if b.attn.ratio in ratios]


def change(patch, modules, name, function):
    """Replace parameter `name` of every module by function(parameter)."""
    for module in modules:
        patch.setitem(module, name, function(module[name]))


def experts(model):
    return [b.ffn.experts for b in model.layers]


def retable(patch, model, ratios, compressed, **rope):
    """Give the layers of some ratios a rotary table of another configuration."""
    config = model.args
    if "scaling" in rope:
        scaling = config.rope_scaling.model_copy(update=rope.pop("scaling"))
        config = config.model_copy(update={"rope_scaling": scaling})
    table = Rotary(config.model_copy(update=rope), compressed)
    for attn in with_ratio(model, *ratios):
        patch.setattr(attn, "_rotary", table)


# ----------------------------------------------------------------- hyper-connections
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
    mixes = hyper.HyperConnection.mixes

    def halved(self, streams):
        pre, post, comb = mixes(self, streams)
        return pre, post / 2, comb

    patch.setattr(hyper.HyperConnection, "mixes", halved)


@fault
def streams_in_reverse_order(patch, model):
    project = hyper.project
    patch.setattr(hyper, "project", lambda s, fn, eps: project(s[..., ::-1, :], fn, eps))


@fault
def streams_flattened_channel_major(patch, model):
    project = hyper.project
    patch.setattr(
        hyper,
        "project",
        lambda s, fn, eps: project(mx.swapaxes(s, -1, -2).reshape(s.shape), fn, eps),
    )


@fault
def one_sinkhorn_iteration(patch, model):
    sinkhorn = hyper.sinkhorn
    patch.setattr(hyper, "sinkhorn", lambda logits, n, eps: sinkhorn(logits, 1, eps))


@fault
def sinkhorn_rows_and_columns_swapped(patch, model):
    sinkhorn = hyper.sinkhorn
    patch.setattr(
        hyper,
        "sinkhorn",
        lambda c, n, eps: mx.swapaxes(sinkhorn(mx.swapaxes(c, -1, -2), n, eps), -1, -2),
    )


@fault
def no_rms_before_the_projection(patch, model):
    patch.setattr(hyper, "project", lambda s, fn, eps: s.astype(mx.float32).flatten(-2) @ fn.T)


@fault
def head_takes_the_mean_of_the_streams(patch, model):
    patch.setattr(hyper.HyperHead, "__call__", lambda self, streams: streams.mean(-2))


# ----------------------------------------------------------------- rotary embedding
@fault
def compress_theta_and_yarn_on_window_layers(patch, model):
    retable(patch, model, [0], True)


@fault
def yarn_on_window_layers(patch, model):
    retable(patch, model, [0], True, compress_rope_theta=model.args.rope_theta)


@fault
def no_yarn(patch, model):
    retable(patch, model, [4, 128], True, scaling={"original_max_position_embeddings": 0})


@fault
def rope_theta_on_compressed_layers(patch, model):
    retable(patch, model, [4, 128], True, compress_rope_theta=model.args.rope_theta)


@fault
def rope_pairs_are_halves(patch, model):
    def halves(x, angles, inverse=False):
        dims = 2 * angles[0].shape[-1]
        tail = x[..., -dims:]
        order = mx.arange(dims).reshape(2, -1).T.flatten()
        turned = rotate(mx.take(tail, order, axis=-1), angles, inverse)
        return mx.concatenate([x[..., :-dims], mx.take(turned, mx.argsort(order), axis=-1)], -1)

    for module in (attention, compressor, indexer):
        patch.setattr(module, "rotate", halves)


@fault
def rope_on_the_first_channels(patch, model):
    def first(x, angles, inverse=False):
        dims = 2 * angles[0].shape[-1]
        return mx.concatenate([rotate(x[..., :dims], angles, inverse), x[..., dims:]], -1)

    for module in (attention, compressor, indexer):
        patch.setattr(module, "rotate", first)


@fault
def output_rotation_not_undone(patch, model):
    patch.setattr(
        attention, "rotate", lambda x, angles, inverse=False: x if inverse else rotate(x, angles)
    )


def row_positions(patch, place):
    """Rotate compressed rows to place(first position, ratio) instead of their first position."""
    angles = Rotary.angles

    def other(self, start, count, step=1):
        if step == 1:
            return angles(self, start, count)
        parts = [angles(self, place(start + i * step, step), 1) for i in range(count)]
        return tuple(mx.concatenate(list(part)) for part in zip(*parts, strict=True))

    patch.setattr(Rotary, "angles", other)


@fault
def row_rotated_to_the_end_of_its_group(patch, model):
    row_positions(patch, lambda position, ratio: position + ratio - 1)


@fault
def row_rotated_by_its_number(patch, model):
    row_positions(patch, lambda position, ratio: position // ratio)


# ----------------------------------------------------------------- attention
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
    patch.setattr(attention, "sink_attention", lambda q, s, k, c: attend(q, s, k, plain**-0.5))


@fault
def heads_grouped_in_the_other_order(patch, model):
    output, groups = attention.Attention.output, model.args.o_groups

    def interleaved(self, out):
        b, n, h, c = out.shape
        return output(self, mx.swapaxes(out.reshape(b, n, h // groups, groups, c), 2, 3))

    patch.setattr(attention.Attention, "output", interleaved)


# ----------------------------------------------------------------- compressors
@fault
def no_overlap_with_the_previous_group(patch, model):
    groups = Compressor.groups

    def alone(self, span, first, last):
        found = groups(self, span, first, last)
        return found[:, :, self.ratio :] if self.overlaps else found

    patch.setattr(Compressor, "groups", alone)


@fault
def lanes_swapped(patch, model):
    project = Compressor.project

    def swapped(self, x, offset):
        found = project(self, x, offset)
        return mx.roll(found, self.width, axis=-1) if self.overlaps else found

    patch.setattr(Compressor, "project", swapped)


@fault
def two_softmaxes_averaged(patch, model):
    pool = Compressor.pool

    def halves(self, candidates):
        if not self.overlaps:
            return pool(self, candidates)
        first, second = mx.split(candidates, 2, axis=2)
        first = mx.where(mx.isinf(first), 0.0, first)
        return (pool(self, first) + pool(self, second)) / 2

    patch.setattr(Compressor, "pool", halves)


@fault
def first_group_averages_four_zero_rows(patch, model):
    patch.setattr(
        Compressor,
        "nothing",
        lambda self, batch: mx.zeros((batch, self.ratio, 2, 2 * self.width)),
    )


@fault
def no_position_bias(patch, model):
    modules = [a.compressor for a in with_ratio(model, 4, 128)]
    change(patch, modules, "ape", mx.zeros_like)


@fault
def position_bias_by_place_in_the_chunk(patch, model):
    project = Compressor.project
    patch.setattr(Compressor, "project", lambda self, x, offset: project(self, x, 1))


@fault
def norm_of_compressed_rows_skipped(patch, model):
    for attn in with_ratio(model, 4, 128):
        patch.setitem(attn.compressor, "norm", lambda rows: rows)


# ----------------------------------------------------------------- indexer
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
        return mx.einsum("blhd,brd,blh->blr", q, rows, weights)

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
    context = attention.Attention.context
    patch.setattr(
        attention.Attention,
        "context",
        lambda self, x, qr, angles, state: context(self, x, self.wq_a(x), angles, state),
    )


# ----------------------------------------------------------------- mixture of experts
def rescore(patch, function):
    patch.setattr(moe.Router, "scores", function)


@fault
def no_square_root(patch, model):
    scores = moe.Router.scores
    rescore(patch, lambda self, x: scores(self, x) ** 2)


@fault
def softmax_scores(patch, model):
    rescore(patch, lambda self, x: mx.softmax(x @ self.weight.astype(mx.float32).T, axis=-1))


@fault
def bias_also_in_the_weights(patch, model):
    scores = moe.Router.scores
    rescore(patch, lambda self, x: scores(self, x) + (0 if self.hashed else self.bias))
    choose = moe.Router.choose
    patch.setattr(moe.Router, "choose", lambda self, s: choose(self, s - self.bias))


@fault
def bias_not_used_in_the_choice(patch, model):
    choose = moe.Router.choose
    patch.setattr(moe.Router, "choose", lambda self, s: choose(self, s - self.bias))


def reroute(patch, function):
    call = moe.Router.__call__
    patch.setattr(moe.Router, "__call__", lambda self, x, ids: function(self, x, ids, call))


@fault
def weights_not_normalised(patch, model):
    def raw(self, x, ids, call):
        experts, _ = call(self, x, ids)
        return experts, mx.take_along_axis(self.scores(x), experts, axis=-1) * self.scale

    reroute(patch, raw)


@fault
def routed_scaling_ignored(patch, model):
    for block in model.layers:
        patch.setattr(block.ffn.gate, "scale", 1.0)


@fault
def equal_weights_in_hash_layers(patch, model):
    def equal(self, x, ids, call):
        experts, weights = call(self, x, ids)
        mean = mx.broadcast_to(weights.mean(-1, keepdims=True), weights.shape)
        return experts, mean if self.hashed else weights

    reroute(patch, equal)


@fault
def hash_of_the_next_token(patch, model):
    reroute(patch, lambda self, x, ids, call: call(self, x, mx.roll(ids, -1, axis=-1)))


@fault
def hash_by_position(patch, model):
    reroute(
        patch,
        lambda self, x, ids, call: call(self, x, mx.arange(ids.shape[1])[None]),
    )


@fault
def routed_clamp_missing(patch, model):
    for module in experts(model):
        patch.setattr(module, "limit", mx.inf)


@fault
def shared_clamp_missing(patch, model):
    for block in model.layers:
        patch.setattr(block.ffn.shared_experts, "limit", mx.inf)


@fault
def gate_clamped_from_below_too(patch, model):
    swiglu = moe.swiglu
    patch.setattr(moe, "swiglu", lambda g, u, limit: swiglu(mx.maximum(g, -limit), u, limit))


@fault
def gate_and_up_swapped(patch, model):
    for module in experts(model):
        w1, w3 = module.w1, module.w3
        patch.setitem(module, "w1", w3)
        patch.setitem(module, "w3", w1)


# ----------------------------------------------------------------- stored weights
@storage_fault
def nibbles_swapped(patch, model):
    def swap(codes):
        return ((codes & 0x0F0F0F0F) << 4) | ((codes >> 4) & 0x0F0F0F0F)

    change(patch, [m.w1 for m in experts(model)], "weight", swap)


@storage_fault
def fp4_scales_off_by_one_group(patch, model):
    change(patch, [m.w1 for m in experts(model)], "scales", lambda s: mx.roll(s, 1, axis=-1))


@storage_fault
def fp8_scales_off_by_one_tile(patch, model):
    modules = [b.attn.wo_b for b in model.layers]
    change(patch, modules, "scales", lambda s: mx.roll(s, 4, axis=-1))


@storage_fault
def fp8_scale_tiles_transposed(patch, model):
    def transpose(scales):
        tiles = scales[::128, ::4]
        return mx.repeat(mx.repeat(tiles.T, 128, axis=0), 4, axis=1)

    change(patch, [b.attn.wo_b for b in model.layers], "scales", transpose)


@storage_fault
def fp4_scales_one_power_low(patch, model):
    change(patch, [m.w2 for m in experts(model)[:1]], "scales", lambda s: s - 1)
