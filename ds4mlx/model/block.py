"""One block of the model: attention and MoE, each inside a hyper-connection."""

import mlx.core as mx
import mlx.nn as nn

from ds4mlx.config import ModelConfig
from ds4mlx.model.attention import Attention
from ds4mlx.model.hyper import HyperConnection
from ds4mlx.model.linear import RMSNorm
from ds4mlx.model.moe import MoE
from ds4mlx.model.rope import Rotary
from ds4mlx.state.layer import LayerState
from ds4mlx.state.rounding import Rounding


class Block(nn.Module):
    """Attention and MoE, each between the two halves of a hyper-connection."""

    def __init__(self, config: ModelConfig, block: int, rounding: Rounding, rotary: Rotary):
        super().__init__()
        self.hc_attn = HyperConnection(config)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, block, rounding, rotary)
        self.hc_ffn = HyperConnection(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, block)

    def __call__(self, streams: mx.array, ids: mx.array, state: LayerState) -> mx.array:
        """streams (B, L, n, D) of tokens ids (B, L) -> streams; `state` moves on by L tokens."""
        shape, streams = streams.shape, streams.flatten(0, 1)
        x, post, comb = self.hc_attn.before(streams)
        x = mx.unflatten(self.attn_norm(x), 0, ids.shape)
        out = self.attn(x, state).flatten(0, 1)
        streams = self.hc_attn.merge(streams, out, post, comb)
        x, post, comb = self.hc_ffn.before(streams)
        out = self.ffn(self.ffn_norm(x), ids.flatten())
        state.offset += ids.shape[1]
        return self.hc_ffn.merge(streams, out, post, comb).reshape(shape)
