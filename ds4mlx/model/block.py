"""One block of the model: attention and MoE, each inside a hyper-connection."""

from collections.abc import Sequence

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.model.batch import Batch
from ds4mlx.model.compressed_attention import attention_of
from ds4mlx.model.hyper import HyperConnection
from ds4mlx.model.linear import RMSNorm
from ds4mlx.model.module import Module
from ds4mlx.model.moe import MoE
from ds4mlx.model.taps import inside, site_of, tap
from ds4mlx.state.layer import LayerState
from ds4mlx.state.rounding import Rounding


class Block(Module):
    """Attention and MoE, each between the two halves of a hyper-connection."""

    def __init__(self, config: ModelConfig, block: int, rounding: Rounding):
        super().__init__()
        self.hc_attn = HyperConnection(config)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = attention_of(config, block, rounding)
        self.hc_ffn = HyperConnection(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, block)
        self._site = site_of(config, block)

    def __call__(self, streams: mx.array, batch: Batch, states: Sequence[LayerState]) -> mx.array:
        """streams (N, n, D) of the batch's tokens -> streams.

        states: this block's, one for each span; what becomes of them goes into the spans' steps.
        """
        return self.fed(self.attended(streams, batch, states), batch)

    def attended(self, streams: mx.array, batch: Batch, states: Sequence[LayerState]) -> mx.array:
        """The first half: streams (N, n, D) -> streams after the attention."""
        streams, x, post, comb = self.before("hc_attn.", self.hc_attn, self.attn_norm, streams)
        x = tap(self._site, "attn.in", x)
        out = tap(self._site, "attn.out", self.attn(x, batch, states))
        streams = self.hc_attn.merge(streams, out, post, comb)
        return tap(self._site, "attn.streams", streams)

    def fed(self, streams: mx.array, batch: Batch) -> mx.array:
        """The second half: streams (N, n, D) after the attention -> streams after the MoE."""
        streams, x, post, comb = self.before("hc_ffn.", self.hc_ffn, self.ffn_norm, streams)
        x = tap(self._site, "ffn.in", x)
        out = tap(self._site, "ffn.out", self.ffn(x, batch.ids))
        return tap(self._site, "streams", self.hc_ffn.merge(streams, out, post, comb))

    def before(
        self, name: str, site: HyperConnection, norm: RMSNorm, streams: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """The streams, a sublayer's input, normed, and post and comb for what it gives."""
        name = self._site + name
        streams = tap(name, "streams", streams)
        x, post, comb = site.before(streams, norm, inside(name, "pre", "collapsed"))
        return streams, x, tap(name, "post", post), tap(name, "comb", comb)
