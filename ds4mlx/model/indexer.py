"""The lightning indexer of CSA layers: which compressed rows a query attends to."""

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.layer import chunk_scores, index_select, turned_rows
from ds4mlx.custom_kernels.layer.plain import Angles, rotate
from ds4mlx.model.batch import Span
from ds4mlx.model.compressor import Compressor
from ds4mlx.model.linear import Linear
from ds4mlx.model.module import Module
from ds4mlx.model.ties import settle
from ds4mlx.state.layer import CompressorState
from ds4mlx.state.rounding import Rounding, round_index
from ds4mlx.state.row_forms import PlainRows, RowForm


class Indexer(Module):
    """Scores rows by sum_h w_h relu(q_h . k) with its own small compressor and heads."""

    def __init__(self, config: ModelConfig, rounding: Rounding):
        super().__init__()
        self.heads, self.width, self.topk = (
            config.index_n_heads,
            config.index_head_dim,
            config.index_topk,
        )
        self.wq_b = Linear(self.heads * self.width, config.q_lora_rank)
        self.weights_proj = Linear(self.heads, config.hidden_size)
        self.compressor = Compressor(config, self.width, 4, spread=rounding != "none")
        self.rounding: Rounding = rounding
        self.heap_ties = False  # see `Model.settle_ties`
        self.settles_on_gpu = False  # where the host's choice would keep it waiting

    def extend(
        self, projected: mx.array, span: Span, state: CompressorState, dtype: mx.Dtype
    ) -> mx.array:
        """Take a span's projections by `compressor`; all index rows so far, as laid out, (R, .)."""
        return state.rows.extend(self.compressor(projected, span, state, dtype), span.step)

    def queries(self, qr: mx.array, angles: Angles) -> mx.array:
        """Index queries from the normed query latent qr (N, rank): (N, heads, width)."""
        q = self.wq_b(qr).reshape(-1, self.heads, self.width)
        layout, rounds = PlainRows(self.width, q.dtype).layout, self.rounding != "none"
        layout = layout._replace(kind="rounded") if rounds else layout
        if turned_rows.takes(q, angles, layout, spread=rounds):
            return turned_rows.by_kernel(q, angles, layout, spread=rounds)
        return round_index(rotate(q, angles), self.rounding)

    def head_weights(self, x: mx.array) -> mx.array:
        """Signed weight of every head, float32 (N, heads)."""
        scale = (self.width * self.heads) ** -0.5
        return self.weights_proj(x.astype(mx.float32)) * scale

    def scores(
        self, q: mx.array, weights: mx.array, rows: mx.array, form: RowForm, scratch: int
    ) -> mx.array:
        """Scores of all rows (R, .), as laid out, for queries (L, heads, width): (L, R) float32.

        At most about `scratch` elements of per-head products, or of unpacked rows, exist at a time.
        """
        length, heads, width = q.shape
        flat = q.astype(mx.float32).reshape(length * heads, width)
        size = max(1, scratch // max(length * heads, width))
        parts: list[mx.array] = []
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            if parts:  # in turn, so that one block's products are alive at a time
                block = mx.depends([block], parts[-1:])[0]
            hits = mx.maximum(flat @ form.unpack(block).T, 0).reshape(length, heads, -1)
            parts.append((weights[:, None] @ hits).squeeze(1))
        return mx.concatenate(parts, axis=-1)

    def launches(self, q: mx.array, rows: mx.array, form: RowForm) -> bool:
        """Whether kernels choose among rows (R, .) for queries (L, heads, width): see `best`."""
        scores = mx.zeros((1, 1), mx.float32)
        selects = index_select.takes(mx.broadcast_to(scores, (len(q), len(rows))), self.topk)
        settles = self.heap_ties and self.settles_on_gpu
        return selects and not settles and chunk_scores.takes(q, rows, form.layout)

    def best(
        self, q: mx.array, weights: mx.array, rows: mx.array, form: RowForm, start: int
    ) -> mx.array:
        """The `topk` best visible rows for queries from position `start` on, by kernels: int32 (L, topk).

        -1 stands where a query sees fewer.
        """
        scores = chunk_scores.by_kernel(q, weights, rows, start, form.layout)
        place = mx.array([start, 0, 0, 0, 0, 0, 0, 0], dtype=mx.int32)
        return index_select.by_kernel(scores, place, self.topk, chunk_scores.RATIO)

    def select(self, scores: mx.array, visible: mx.array) -> mx.array:
        """The `topk` best visible rows: scores and visible bool (L, R) -> int (L, topk).

        A query with fewer visible rows gets invisible ones among them: mask by visibility again.
        """
        masked = mx.where(visible, scores, -mx.inf)
        chosen = mx.argpartition(-masked, self.topk - 1, axis=-1)[..., : self.topk]
        chosen = mx.stop_gradient(chosen)
        settles = self.settles_on_gpu or mx.default_device() == mx.cpu
        return settle(masked, chosen) if self.heap_ties and settles else chosen
