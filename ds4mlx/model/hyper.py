"""Hyper-connections: the residual lives in n streams, mixed around every sublayer (mHC).

A site reads the streams, hands the sublayer one collapsed vector, and spreads its output back.
Everything is float32 inside; streams keep the activation type.
"""

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.layer.hyper_before import before_sublayer
from ds4mlx.custom_kernels.layer.hyper_post import after_sublayer
from ds4mlx.custom_kernels.layer.hyper_pre import collapse, project
from ds4mlx.model.linear import RMSNorm
from ds4mlx.model.module import Module
from ds4mlx.model.taps import Inside, tap


class HyperConnection(Module):
    """The site before and after one sublayer (attention or MoE)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        n = config.hc_mult
        self.fn = mx.zeros(((2 + n) * n, n * config.hidden_size))
        self.base = mx.zeros(((2 + n) * n,))
        self.scale = mx.zeros((3,))
        self._config = config

    def before(
        self, streams: mx.array, norm: RMSNorm, seen: Inside | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The sublayer's input (N, D), normed, out of streams (N, n, D); post and comb for `merge`.

        seen: is given the weights `pre` of the streams (N, n), and what is `collapsed` by them (N, D),
        to go on from.
        """
        return before_sublayer(
            *(streams, self.fn, self.base, self.scale, norm.weight),
            iterations=self._config.hc_sinkhorn_iters,
            eps=self._config.hc_eps,
            norm_eps=norm.eps,
            seen=seen,
        )

    def merge(self, streams: mx.array, out: mx.array, post: mx.array, comb: mx.array) -> mx.array:
        """Streams (N, n, D) after a sublayer that made out (N, D) of those from before it."""
        return after_sublayer(streams, out, post, comb)


class HyperHead(Module):
    """The collapse of the streams before the final norm: sigmoid weights, no Sinkhorn."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        n = config.hc_mult
        self.fn = mx.zeros((n, n * config.hidden_size))
        self.base = mx.zeros((n,))
        self.scale = mx.zeros((1,))
        self._config = config

    def __call__(self, streams: mx.array, site: str = "") -> mx.array:
        """streams (..., n, D) -> (..., D); `site`: how the names of the head's quantities begin."""
        site += "head."
        streams = tap(site, "streams", streams)
        mix = project(streams, self.fn, self._config.rms_norm_eps)
        pre = mx.sigmoid(mix * self.scale + self.base) + self._config.hc_eps
        return tap(site, "collapsed", collapse(streams, tap(site, "pre", pre)))
