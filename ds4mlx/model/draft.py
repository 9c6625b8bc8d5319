"""The draft block (MTP): from the streams at token t and the embedding of token t + 1 to token t + 2."""

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.model.block import Block
from ds4mlx.model.hyper import HyperHead
from ds4mlx.model.linear import Linear, RMSNorm
from ds4mlx.state.rounding import Rounding


class MTP(Block):
    """A draft block: from the streams at token t and the embedding of token t + 1 to token t + 2.

    Embedding and head are the main model's; it is called through `Model.draft`.
    """

    def __init__(self, config: ModelConfig, block: int, rounding: Rounding):
        super().__init__(config, block, rounding)
        eps, width = config.rms_norm_eps, config.hidden_size
        self.enorm, self.hnorm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.e_proj, self.h_proj = Linear(width, width), Linear(width, width)
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(width, eps)

    def joined(self, streams: mx.array, embedded: mx.array) -> mx.array:
        """The block's input (N, n, D) from streams (N, n, D) and next tokens' embeddings (N, D)."""
        return self.e_proj(self.enorm(embedded))[..., None, :] + self.h_proj(self.hnorm(streams))
