"""The mixture of experts: router, routed experts, and the shared expert every token passes."""

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.layer.router import route
from ds4mlx.custom_kernels.products.experts import routed_experts
from ds4mlx.custom_kernels.products.swiglu import swiglu
from ds4mlx.model.linear import ExpertStack, Linear
from ds4mlx.model.module import Module
from ds4mlx.model.taps import Inside, inside, site_of, tap


class Router(Module):
    """Chooses experts by score plus bias, or in hash layers by token id; weighs them by score."""

    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        self.topk, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.hashed = block < config.num_hash_layers
        self._site = site_of(config, block) + "ffn."
        self.weight = mx.zeros((config.n_routed_experts, config.hidden_size))
        if self.hashed:
            self.tid2eid = mx.zeros((config.vocab_size, self.topk), mx.int32)
        else:
            self.bias = mx.zeros((config.n_routed_experts,))

    def __call__(self, x: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
        """x (N, D), ids int (N,) -> experts int (N, k) and their weights float32 (N, k)."""
        by = {"table": self.tid2eid, "ids": ids} if self.hashed else {"bias": self.bias}
        seen = inside(self._site, "router.logits", "router.scores", "router.choice")
        experts, weights = route(x, self.weight, self.scale, self.topk, **by, seen=seen)
        experts = tap(self._site, "router.experts", experts)
        return experts, tap(self._site, "router.weights", weights)


class RoutedExperts(Module):
    """All experts of a layer, each projection one stack: w1 gate, w3 up, w2 down."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        count, width = config.n_routed_experts, config.moe_intermediate_size
        self.w1 = ExpertStack(count, width, config.hidden_size)
        self.w2 = ExpertStack(count, config.hidden_size, width)
        self.w3 = ExpertStack(count, width, config.hidden_size)
        self.limit = config.swiglu_limit

    def __call__(
        self, x: mx.array, experts: mx.array, weights: mx.array, seen: Inside | None = None
    ) -> mx.array:
        """Weighted sum over the chosen experts, float32.

        x (N, D), experts int (N, k), weights float32 (N, k) -> (N, D). seen: see `routed_experts`.
        """
        stacks = self.w1, self.w3, self.w2
        return routed_experts(*stacks, x, experts, weights, self.limit, seen)


class SharedExpert(Module):
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


class MoE(Module):
    """Routed experts plus the shared expert."""

    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        self.gate = Router(config, block)
        self.experts = RoutedExperts(config)
        self.shared_experts = SharedExpert(config)
        self._site = site_of(config, block) + "ffn."

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        """x (N, D), normed, ids int (N,) -> (N, D) in x's type."""
        experts, weights = self.gate(x, ids)
        seen = inside(self._site, "experts.hidden", "experts.each")
        routed = tap(self._site, "experts.out", self.experts(x, experts, weights, seen))
        shared = tap(self._site, "shared_experts.out", self.shared_experts(x))
        return (routed + shared.astype(mx.float32)).astype(x.dtype)
