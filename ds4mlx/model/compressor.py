"""Compressors: every `ratio` tokens become one KV row, pooled channel by channel over time.

Ratio 128 (HCA) pools its group. Ratio 4 (CSA, and the indexer) also pools the group before: each
token makes two lanes, the first used by the next group's row, the second by its own.
"""

import mlx.core as mx
import mlx.nn as nn

from ds4mlx.config import ModelConfig
from ds4mlx.model.linear import Linear, RMSNorm
from ds4mlx.model.rope import Rotary, rotate
from ds4mlx.state.layer import CompressorState


class Compressor(nn.Module):
    """Pools tokens into normed, rotated rows of `width` channels; streaming, any chunking."""

    def __init__(self, config: ModelConfig, width: int, ratio: int):
        super().__init__()
        lanes = 2 if ratio == 4 else 1
        self.ratio, self.width, self.overlaps = ratio, width, lanes == 2
        self.wkv = Linear(lanes * width, config.hidden_size)
        self.wgate = Linear(lanes * width, config.hidden_size)
        self.ape = mx.zeros((ratio, lanes * width))
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def __call__(
        self, x: mx.array, offset: int, state: CompressorState, rotary: Rotary
    ) -> mx.array:
        """Take tokens x (B, L, D) at positions from `offset`; return the rows they complete.

        Rows are (B, g, width) in x's type, g >= 0, not yet rounded; row j stands for tokens
        ratio * j .. ratio * j + ratio - 1 and is rotated to the first of them.
        """
        span = self.span(x, offset, state)
        first, last = offset // self.ratio, (offset + x.shape[1]) // self.ratio
        if first == last:
            return mx.zeros((x.shape[0], 0, self.width), x.dtype)
        rows = self.pool(self.groups(span, first, last))
        angles = rotary.angles(first * self.ratio, last - first, self.ratio)
        return rotate(self.norm(rows.astype(x.dtype)), angles)

    def span(self, x: mx.array, offset: int, state: CompressorState) -> mx.array:
        """Projections of x and of the earlier tokens its groups need, (B, ., 2, channels)."""
        back = offset - state.needed(offset)
        return state.recent.extend(self.project(x, offset), back)

    def project(self, x: mx.array, offset: int) -> mx.array:
        """Values and scores of tokens x (B, L, D), float32 (B, L, 2, channels).

        Each score carries the bias of its token's place in its group.
        """
        x = x.astype(mx.float32)
        place = (offset + mx.arange(x.shape[1])) % self.ratio
        return mx.stack([self.wkv(x), self.wgate(x) + self.ape[place]], axis=-2)

    def groups(self, span: mx.array, first: int, last: int) -> mx.array:
        """Pooling candidates of rows first..last-1: (B, rows, candidates, 2, width)."""
        batch, _, two, channels = span.shape
        if self.overlaps and first == 0:
            span = mx.concatenate([self.nothing(batch), span], axis=1)
        count = last - first + (1 if self.overlaps else 0)
        span = span[:, : count * self.ratio].reshape(batch, count, self.ratio, two, channels)
        if not self.overlaps:
            return span
        previous, current = span[:, :-1, ..., : self.width], span[:, 1:, ..., self.width :]
        return mx.concatenate([previous, current], axis=2)

    def nothing(self, batch: int) -> mx.array:
        """The group before the first: values 0, scores -inf, so that it takes no part."""
        values = mx.zeros((batch, self.ratio, 1, 2 * self.width))
        return mx.concatenate([values, values - mx.inf], axis=2)

    def pool(self, candidates: mx.array) -> mx.array:
        """Softmax over the candidates, for every channel by itself: (B, rows, width) float32."""
        values, scores = candidates[..., 0, :], candidates[..., 1, :]
        return (mx.softmax(scores, axis=2, precise=True) * values).sum(axis=2)
