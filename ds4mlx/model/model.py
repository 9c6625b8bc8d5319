"""DeepSeek-V4: embedding, blocks joined by hyper-connections, head, and the MTP blocks.

The module tree carries the official tensor names, so a weight is found by its name in the
checkpoint and a computation by its name in the paper.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ds4mlx.config import ModelConfig
from ds4mlx.model.block import Block
from ds4mlx.model.draft import MTP
from ds4mlx.model.hyper import HyperHead
from ds4mlx.model.linear import Embedding, Linear, RMSNorm
from ds4mlx.model.rope import Rotary
from ds4mlx.precision import keep_float32
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.layer import LayerState
from ds4mlx.state.rounding import Rounding
from ds4mlx.state.row_forms import StateForm


class Model(nn.Module):
    """The whole model. Activations have type `dtype`; logits are float32.

    `rounding="official"` rounds KV rows to FP8 and the indexer's queries and rows to FP4, as in the
    forward pass the weights were trained with; "none" leaves them as computed.
    """

    def __init__(
        self,
        args: ModelConfig,
        dtype: mx.Dtype = mx.bfloat16,
        rounding: Rounding = "official",
    ):
        keep_float32()
        super().__init__()
        self.args, self.dtype = args, dtype
        self.rounding: Rounding = rounding
        self.model_type = args.model_type
        self.identity: str | None = None  # of the directory it was loaded from
        plain, long = Rotary(args, compressed=False), Rotary(args, compressed=True)
        tables = {0: plain, 4: long, 128: long}
        layers, drafts = args.num_hidden_layers, args.num_nextn_predict_layers
        self.embed = Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, i, rounding, tables[args.ratio(i)]) for i in range(layers)]
        self.hc_head = HyperHead(args)
        self.norm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.head = Linear(args.vocab_size, args.hidden_size)
        self.mtp = [
            MTP(args, i, rounding, tables[args.ratio(i)]) for i in range(layers, layers + drafts)
        ]

    def __call__(self, tokens: mx.array, cache: DecodeState | None = None) -> mx.array:
        """tokens int (B, L) -> logits float32 (B, L, vocab); `cache` moves on by L tokens.

        Without a cache the tokens stand alone. L may be 1 or any chunk, at any depth.
        """
        return self.logits(self.streams(tokens, cache))

    def last_logits(self, tokens: mx.array, cache: DecodeState) -> mx.array:
        """Like calling the model, but the head runs for the last token only: (B, vocab)."""
        return self.logits(self.streams(tokens, cache)[:, -1:])[:, 0]

    def embedded(self, tokens: mx.array) -> mx.array:
        """tokens (B, L) -> (B, L, D)."""
        return self.embed(tokens).astype(self.dtype)

    def streams(self, tokens: mx.array, cache: DecodeState | None = None) -> mx.array:
        """Residual streams after the last layer, (B, L, n, D), in the activation type.

        Evaluating them evaluates the cache, so that no graph outlives a token.
        """
        state = self.make_cache() if cache is None else cache
        streams = mx.repeat(self.embedded(tokens)[:, :, None], self.args.hc_mult, axis=2)
        for layer, layer_state in zip(self.layers, state, strict=True):
            streams = layer(streams, tokens, layer_state)
        if cache is None:
            return streams
        cache.set_aside()
        return mx.depends([streams], cache.arrays)[0]

    def logits(self, streams: mx.array) -> mx.array:
        """Head: collapse (B, L, n, D), norm, float32 product with the vocabulary."""
        return self.unembedded(self.norm(self.hc_head(streams)))

    def unembedded(self, hidden: mx.array) -> mx.array:
        """hidden (B, L, D), normed -> logits float32 (B, L, vocab)."""
        return self.head(hidden.astype(mx.float32))

    def draft(
        self, streams: mx.array, tokens: mx.array, state: LayerState | None = None, depth: int = 0
    ) -> tuple[mx.array, mx.array]:
        """Logits of MTP block `depth` and its streams.

        streams: (B, L, n, D) at positions t; tokens: int (B, L), those at t + 1; the logits
        (B, L, vocab) are for t + 2. `state` is the block's own, see `make_draft_state`.
        """
        state = self.make_draft_state(depth) if state is None else state
        block = self.mtp[depth]
        streams = block(block.joined(streams, self.embedded(tokens)), tokens, state)
        return self.unembedded(block.norm(block.hc_head(streams))), streams

    @property
    def state_form(self) -> StateForm:
        """How this model's decode states hold their rows."""
        return StateForm.of(self.args, self.dtype, self.rounding)

    def make_cache(self) -> DecodeState:
        """An empty decode state."""
        return DecodeState(self.args, self.dtype, self.rounding)

    def make_draft_state(self, depth: int = 0) -> LayerState:
        """An empty state for MTP block `depth`."""
        block = self.args.num_hidden_layers + depth
        return LayerState(self.args, block, self.state_form)

    def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The weights of a converted directory as they are: names and shapes are the model's own."""
        return weights
