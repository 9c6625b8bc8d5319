"""Mistakes in the mixture of experts."""

import mlx.core as mx

from ds4mlx.custom_kernels.layer import router
from ds4mlx.custom_kernels.products import experts as routed
from ds4mlx.model import moe
from faults.listing import experts, fault


def rescore(patch, function):
    patch.setattr(router, "scores", function)


def reroute(patch, function):
    call = moe.Router.__call__
    patch.setattr(moe.Router, "__call__", lambda self, x, ids: function(self, x, ids, call))


@fault
def no_square_root(patch, model):
    scores = router.scores
    rescore(patch, lambda x, weight: scores(x, weight) ** 2)


@fault
def softmax_scores(patch, model):
    rescore(patch, lambda x, weight: mx.softmax(x @ weight.astype(mx.float32).T, axis=-1))


@fault
def bias_also_in_the_weights(patch, model):
    def biased(self, x, ids, call):
        experts, weights = call(self, x, ids)
        if self.hashed:
            return experts, weights
        scores = router.scores(x, self.weight) + self.bias
        weights = mx.take_along_axis(scores, experts, axis=-1)
        return experts, weights / weights.sum(-1, keepdims=True) * self.scale

    reroute(patch, biased)


@fault
def bias_not_used_in_the_choice(patch, model):
    choose = router.choose
    patch.setattr(router, "choose", lambda scores, bias, k: choose(scores, 0 * bias, k))


@fault
def weights_not_normalised(patch, model):
    def raw(self, x, ids, call):
        experts, _ = call(self, x, ids)
        return experts, mx.take_along_axis(
            router.scores(x, self.weight), experts, axis=-1
        ) * self.scale

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
        lambda self, x, ids, call: call(self, x, mx.arange(ids.size)),
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
    for module in (moe, routed):
        patch.setattr(module, "swiglu", lambda g, u, limit: swiglu(mx.maximum(g, -limit), u, limit))


@fault
def gate_and_up_swapped(patch, model):
    for module in experts(model):
        w1, w3 = module.w1, module.w3
        patch.setitem(module, "w1", w3)
        patch.setitem(module, "w3", w1)
