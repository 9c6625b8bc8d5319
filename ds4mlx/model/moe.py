"""The mixture of experts: router, routed experts, and the shared expert every token passes."""

import mlx.core as mx
import mlx.nn as nn

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dispatch
from ds4mlx.model.linear import ExpertStack, Linear

# From this many (token, expert) pairs on, they are sorted by expert: each weight is read once.
SORT_FROM = 64


class Router(nn.Module):
    """Chooses experts by score plus bias, or in hash layers by token id; weighs them by score."""

    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        self.topk, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.hashed = block < config.num_hash_layers
        self.weight = mx.zeros((config.n_routed_experts, config.hidden_size))
        if self.hashed:
            self.tid2eid = mx.zeros((config.vocab_size, self.topk), mx.int32)
        else:
            self.bias = mx.zeros((config.n_routed_experts,))

    def __call__(self, x: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
        """x (N, D), ids int (N,) -> experts int (N, k) and their weights float32 (N, k)."""
        if dispatch.takes_routing(x, self.topk):
            return dispatch.route(x, self.weight, self.scale, self.topk, **self._choice(ids))
        scores = self.scores(x)
        experts = self.tid2eid[ids] if self.hashed else self.choose(scores)
        weights = mx.take_along_axis(scores, experts, axis=-1)
        return experts, weights / weights.sum(-1, keepdims=True) * self.scale

    def _choice(self, ids: mx.array) -> dict[str, mx.array]:
        """What decides beside the scores, as the kernel takes it."""
        return {"table": self.tid2eid, "ids": ids} if self.hashed else {"bias": self.bias}

    def scores(self, x: mx.array) -> mx.array:
        """sqrt(softplus(logit)) of every expert, float32 (N, E)."""
        logits = x.astype(mx.float32) @ self.weight.astype(mx.float32).T
        return mx.sqrt(mx.logaddexp(logits, 0))

    def choose(self, scores: mx.array) -> mx.array:
        """The k experts with the highest score + bias; the bias moves the choice only."""
        biased = scores + self.bias
        return mx.argpartition(-biased, self.topk - 1, axis=-1)[..., : self.topk]


class RoutedExperts(nn.Module):
    """All experts of a layer, each projection one stack: w1 gate, w3 up, w2 down."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        count, width = config.n_routed_experts, config.moe_intermediate_size
        self.w1 = ExpertStack(count, width, config.hidden_size)
        self.w2 = ExpertStack(count, config.hidden_size, width)
        self.w3 = ExpertStack(count, width, config.hidden_size)
        self.limit = config.swiglu_limit

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """Weighted sum over the chosen experts, float32.

        x (N, D), experts int (N, k), weights float32 (N, k) -> (N, D).
        """
        if self._on_kernels(x):
            storage = self.w1.storage, self.w2.storage
            gate, up, down = self.w1.planes, self.w3.planes, self.w2.planes
            return dispatch.routed_experts(storage, gate, up, down, x, experts, weights, self.limit)
        count, k = experts.shape
        if count * k < SORT_FROM:
            out = self.run(x[:, None, None], experts, weights[..., None, None], False)
            return out.squeeze(-2).astype(mx.float32).sum(1)
        flat = experts.flatten()
        order = mx.argsort(flat)
        rows, weight = x[order // k][:, None], weights.flatten()[order][:, None, None]
        out = self.run(rows, flat[order], weight, True).squeeze(-2)
        return out[mx.argsort(order)].reshape(count, k, -1).astype(mx.float32).sum(1)

    def _on_kernels(self, x: mx.array) -> bool:
        """Whether kernels take the three stacks; not where another module stands in for one."""
        if any(type(stack) is not ExpertStack for stack in (self.w1, self.w2, self.w3)):
            return False
        if self.w1.storage != self.w3.storage:
            return False
        count, hidden, _ = self.w1._shape
        return dispatch.takes_experts(x, self.w1.storage, self.w2.storage, count, hidden)

    def run(self, x: mx.array, experts: mx.array, weights: mx.array, ordered: bool) -> mx.array:
        """w2 . (weight * swiglu(w1 . x, w3 . x)) of expert i for row i, in x's type."""
        gate, up = self.w1(x, experts, ordered), self.w3(x, experts, ordered)
        hidden = weights * swiglu(gate, up, self.limit)
        return self.w2(hidden.astype(x.dtype), experts, ordered)


class SharedExpert(nn.Module):
    """The expert of every token, clamped like the routed ones."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.moe_intermediate_size
        self.w1 = Linear(width, config.hidden_size)
        self.w2 = Linear(config.hidden_size, width)
        self.w3 = Linear(width, config.hidden_size)
        self.limit = config.swiglu_limit

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., D) -> (..., D)."""
        return self.w2(swiglu(self.w1(x), self.w3(x), self.limit).astype(x.dtype))


class MoE(nn.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        self.gate = Router(config, block)
        self.experts = RoutedExperts(config)
        self.shared_experts = SharedExpert(config)

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        """x (N, D), normed, ids int (N,) -> (N, D) in x's type."""
        experts, weights = self.gate(x, ids)
        routed = self.experts(x, experts, weights)
        return (routed + self.shared_experts(x).astype(mx.float32)).astype(x.dtype)


def swiglu(gate: mx.array, up: mx.array, limit: float) -> mx.array:
    """silu(gate) * up, float32; both clamped from above, `up` also from below."""
    gate = mx.minimum(gate.astype(mx.float32), limit)
    up = mx.clip(up.astype(mx.float32), -limit, limit)
    return gate * mx.sigmoid(gate) * up
