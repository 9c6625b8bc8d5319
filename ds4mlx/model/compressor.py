"""Compressors: every `ratio` tokens become one KV row, pooled channel by channel over time.

Ratio 128 (HCA) pools its group. Ratio 4 (CSA, and the indexer) also pools the group before: each
token makes two lanes, the first used by the next group's row, the second by its own.
"""

from typing import Any

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.layer import turned_rows
from ds4mlx.custom_kernels.layer.plain import Angles, rotate
from ds4mlx.model.batch import Span
from ds4mlx.model.linear import Linear, RMSNorm
from ds4mlx.model.module import Module
from ds4mlx.state.layer import CompressorState
from ds4mlx.state.row_forms import RowForm


class Compressor(Module):
    """Pools tokens into normed, rotated rows of `width` channels; streaming, any chunking.

    spread: whether rows are Hadamard-transformed too.
    """

    def __init__(self, config: ModelConfig, width: int, ratio: int, spread: bool = False):
        super().__init__()
        lanes = 2 if ratio == 4 else 1
        self.ratio, self.width, self.overlaps, self.spread = ratio, width, lanes == 2, spread
        self.wkv = Linear(lanes * width, config.hidden_size)
        self.wgate = Linear(lanes * width, config.hidden_size)
        self.ape = mx.zeros((ratio, lanes * width))
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def __call__(
        self, projected: mx.array, span: Span, state: CompressorState, dtype: mx.Dtype
    ) -> mx.array:
        """Take a span's projections (L, 2, channels); return the rows that its tokens complete.

        Rows are (g, .), g >= 0, made of values of type `dtype` and laid out as the state's form says.
        """
        step = span.step
        back = step.offset - state.needed(step.offset)
        recent = state.recent.extend(projected, back, step)
        first, last = step.offset // self.ratio, step.end // self.ratio
        if first == last:
            return state.form.pack(mx.zeros((0, self.width), dtype))
        pooled = self.pool(self.groups(recent, first, last)).astype(dtype)
        return self.finished(pooled, span.rows[self.ratio], state.form)

    def finished(self, pooled: mx.array, angles: Angles, form: RowForm) -> mx.array:
        """Pooled rows (g, width), normed, rotated and laid out, (g, .)."""
        own: dict[str, Any] = {"normed": "weighted", "spread": self.spread}
        if turned_rows.takes(pooled, angles, form.layout, **own):
            own |= {"norm": self.norm.weight, "eps": self.norm.eps}
            return turned_rows.by_kernel(pooled, angles, form.layout, **own)
        rows = rotate(self.norm(pooled), angles)
        return form.pack(mx.hadamard_transform(rows) if self.spread else rows)

    def project(self, x: mx.array, positions: mx.array) -> mx.array:
        """Values and scores of tokens x (N, D), float32 (N, 2, channels).

        Each score carries the bias of its token's place in its group.
        """
        x = x.astype(mx.float32)
        scores = self.wgate(x) + self.ape[positions % self.ratio]
        return mx.stack([self.wkv(x), scores], axis=-2)

    def groups(self, recent: mx.array, first: int, last: int) -> mx.array:
        """Pooling candidates of rows first..last-1: (rows, candidates, 2, width)."""
        if self.overlaps and first == 0:
            recent = mx.concatenate([self.nothing(), recent])
        count = last - first + (1 if self.overlaps else 0)
        groups = mx.unflatten(recent[: count * self.ratio], 0, (count, self.ratio))
        if not self.overlaps:
            return groups
        previous, current = groups[:-1, ..., : self.width], groups[1:, ..., self.width :]
        return mx.concatenate([previous, current], axis=1)

    def nothing(self) -> mx.array:
        """The group before the first: values 0, scores -inf, so that it takes no part."""
        values = mx.zeros((self.ratio, 1, 2 * self.width))
        return mx.concatenate([values, values - mx.inf], axis=1)

    def pool(self, candidates: mx.array) -> mx.array:
        """Softmax over the candidates, for every channel by itself: (rows, width) float32."""
        values, scores = candidates[..., 0, :], candidates[..., 1, :]
        return (mx.softmax(scores, axis=1, precise=True) * values).sum(axis=1)
