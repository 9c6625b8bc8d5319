"""Hyper-connections: the residual lives in n streams, mixed around every sublayer (mHC).

A site reads the streams, hands the sublayer one collapsed vector, and spreads its output back.
Everything is float32 inside; streams keep the activation type.
"""

import mlx.core as mx
import mlx.nn as nn

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dispatch
from ds4mlx.model.linear import rms_norm


class HyperConnection(nn.Module):
    """The site before and after one sublayer (attention or MoE)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        n = config.hc_mult
        self.fn = mx.zeros(((2 + n) * n, n * config.hidden_size))
        self.base = mx.zeros(((2 + n) * n,))
        self.scale = mx.zeros((3,))
        self._config = config

    def before(self, streams: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The sublayer's input (N, D) out of streams (N, n, D); post and comb for `merge`."""
        if not dispatch.takes_few_streams(streams):
            pre, post, comb = self.mixes(streams)
            return collapse(streams, pre), post, comb
        config = self._config
        return dispatch.before_sublayer(
            *(streams, self.fn, self.base, self.scale),
            iterations=config.hc_sinkhorn_iters,
            eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )

    def mixes(self, streams: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """streams (N, n, D) -> pre (N, n), post (N, n), comb (N, n, n), float32."""
        n, eps = self._config.hc_mult, self._config.hc_eps
        mix = project(streams, self.fn, self._config.rms_norm_eps)
        to_pre, to_post, to_comb = mx.split(mix, [n, 2 * n], axis=-1)
        base_pre, base_post, base_comb = mx.split(self.base, [n, 2 * n])
        pre = mx.sigmoid(to_pre * self.scale[0] + base_pre) + eps
        post = 2 * mx.sigmoid(to_post * self.scale[1] + base_post)
        logits = to_comb * self.scale[2] + base_comb
        logits = logits.reshape(*logits.shape[:-1], n, n)
        return pre, post, sinkhorn(logits, self._config.hc_sinkhorn_iters, eps)

    def merge(self, streams: mx.array, out: mx.array, post: mx.array, comb: mx.array) -> mx.array:
        """new_k = post_k out + sum_j comb[j, k] stream_j; out (N, D) -> (N, n, D).

        `streams` are those from before the sublayer; comb goes from stream j to stream k.
        """
        if dispatch.takes_streams(streams):
            return dispatch.after_sublayer(streams, out, post, comb)
        spread = post[..., None] * out[..., None, :].astype(mx.float32)
        kept = mx.swapaxes(comb, -1, -2) @ streams.astype(mx.float32)
        return (spread + kept).astype(streams.dtype)


class HyperHead(nn.Module):
    """The collapse of the streams before the final norm: sigmoid weights, no Sinkhorn."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        n = config.hc_mult
        self.fn = mx.zeros((n, n * config.hidden_size))
        self.base = mx.zeros((n,))
        self.scale = mx.zeros((1,))
        self._config = config

    def __call__(self, streams: mx.array) -> mx.array:
        """streams (..., n, D) -> (..., D)."""
        mix = project(streams, self.fn, self._config.rms_norm_eps)
        return collapse(streams, mx.sigmoid(mix * self.scale + self.base) + self._config.hc_eps)


def project(streams: mx.array, fn: mx.array, eps: float) -> mx.array:
    """fn . RMSNorm(flattened streams), float32: (..., n, D) -> (..., rows of fn)."""
    flat = streams.astype(mx.float32).flatten(-2)
    return rms_norm(flat, None, eps) @ fn.T


def collapse(streams: mx.array, pre: mx.array) -> mx.array:
    """sum_j pre_j stream_j: (..., n, D), (..., n) -> (..., D) in the streams' type."""
    mixed = pre[..., None, :] @ streams.astype(mx.float32)
    return mixed.squeeze(-2).astype(streams.dtype)


def sinkhorn(logits: mx.array, iterations: int, eps: float) -> mx.array:
    """Nearly doubly stochastic (..., n, n): softmax of rows, then columns and rows in turn.

    Ends on columns, so each destination's weights sum to about 1.
    """
    comb = mx.softmax(logits, axis=-1, precise=True) + eps
    comb = comb / (comb.sum(-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdims=True) + eps)
        comb = comb / (comb.sum(-2, keepdims=True) + eps)
    return comb
