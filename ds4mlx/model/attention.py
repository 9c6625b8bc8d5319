"""Attention of one block: a sliding window of raw rows, and compressed rows beside it.

One KV head whose row is key and value at once (MQA). Ratio 0 sees the window only, ratio 128 (HCA)
all compressed rows, ratio 4 (CSA) those the indexer selects; one softmax with a sink spans both.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ds4mlx.config import ModelConfig
from ds4mlx.model.compressor import Compressor
from ds4mlx.model.indexer import Indexer
from ds4mlx.model.linear import GroupedLinear, Linear, RMSNorm, rms_norm
from ds4mlx.model.rope import Angles, Rotary, rotate
from ds4mlx.state.layer import LayerState
from ds4mlx.state.rounding import Rounding
from ds4mlx.state.row_forms import StateForm

# Elements of scores, or of gathered rows, that exist at a time: bounds the scratch of a prefill.
SCRATCH = 1 << 24


@dataclass
class Context:
    """What the queries of one chunk may attend to."""

    offset: int  # position of the chunk's first query
    form: StateForm  # how the rows below are held
    window: mx.array  # (B, before + L, .), ends with the chunk's own rows
    rows: mx.array | None = None  # (B, R, .) compressed rows
    index_rows: mx.array | None = None  # (B, R, .)
    index_q: mx.array | None = None  # (B, L, index heads, index width)
    index_weights: mx.array | None = None  # (B, L, index heads)


class Attention(nn.Module):
    """Projections, the rows of this chunk, the core attention, and the grouped output projection."""

    def __init__(self, config: ModelConfig, block: int, rounding: Rounding, rotary: Rotary):
        super().__init__()
        heads, dim, rank = config.num_attention_heads, config.head_dim, config.q_lora_rank
        self.ratio = config.ratio(block)
        self.rounding: Rounding = rounding
        self._config, self._rotary = config, rotary
        self.wq_a = Linear(rank, config.hidden_size)
        self.q_norm = RMSNorm(rank, config.rms_norm_eps)
        self.wq_b = Linear(heads * dim, rank)
        self.wkv = Linear(dim, config.hidden_size)
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps)
        self.attn_sink = mx.zeros((heads,))
        groups, low_rank = config.o_groups, config.o_lora_rank
        self.wo_a = GroupedLinear(groups, low_rank, heads * dim // groups)
        self.wo_b = Linear(config.hidden_size, groups * low_rank)
        if self.ratio:
            self.compressor = Compressor(config, dim, self.ratio)
        if self.ratio == 4:
            self.indexer = Indexer(config, self.ratio, rounding)

    def __call__(self, x: mx.array, state: LayerState) -> mx.array:
        """x (B, L, D), normed, at positions from state.offset on -> (B, L, D)."""
        angles = self._rotary.angles(state.offset, x.shape[1])
        qr = self.q_norm(self.wq_a(x))
        q = self.queries(qr, angles)
        context = self.context(x, qr, angles, state)
        out = rotate(self.attend(q, context), angles, inverse=True)
        return self.output(out)

    def queries(self, qr: mx.array, angles: Angles) -> mx.array:
        """Queries from the query latent qr (B, L, rank): unit RMS per head, rotated (B, L, H, c)."""
        q = self.wq_b(qr).reshape(*qr.shape[:2], -1, self._config.head_dim)
        return rotate(rms_norm(q, None, self._config.rms_norm_eps), angles)

    def window_rows(self, x: mx.array, angles: Angles) -> mx.array:
        """Raw KV rows of tokens x: normed, rotated, not yet rounded; (B, L, c)."""
        return rotate(self.kv_norm(self.wkv(x)), angles)

    def compressed_rows(self, x: mx.array, state: LayerState) -> mx.array:
        """All compressed rows so far, as held, those that x completes included; (B, R, .)."""
        assert state.compressor is not None
        rows = self.compressor(x, state.offset, state.compressor, self._rotary)
        return state.compressor.rows.extend(state.form.kv.pack(rows))

    def context(self, x: mx.array, qr: mx.array, angles: Angles, state: LayerState) -> Context:
        """Extend the state by tokens x and say what their queries may attend to."""
        rows = state.form.kv.pack(self.window_rows(x, angles))
        window = state.window.extend(rows, state.before)
        context = Context(state.offset, state.form, window)
        if self.ratio:
            context.rows = self.compressed_rows(x, state)
        if self.ratio == 4:
            assert state.indexer is not None
            context.index_rows = self.indexer.extend(x, state, self._rotary)
            if context.index_rows.shape[1] > self.indexer.topk:  # otherwise all rows are kept
                context.index_q = self.indexer.queries(qr, angles)
                context.index_weights = self.indexer.head_weights(x)
        return context

    def attend(self, q: mx.array, context: Context) -> mx.array:
        """Core attention of q (B, L, H, c), a block of queries at a time: (B, L, H, c)."""
        length, outs = q.shape[1], []
        step = self.block_length(q.shape, context)
        for start in range(0, length, step):
            stop, block = min(start + step, length), q[:, start : start + step]
            if outs:  # in turn, so that one block's scores are alive at a time
                block = mx.depends([block], outs[-1:])[0]
            outs.append(self.attend_block(block, start, stop, context))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=1)

    def block_length(self, shape: tuple[int, ...], context: Context) -> int:
        """Queries per block, so that what a block makes stays near SCRATCH elements."""
        batch, _, heads, width = shape
        rows = 0 if context.rows is None else context.rows.shape[1]
        if context.index_q is None:
            per_query = heads * (2 * self._config.sliding_window + rows)
        else:
            kept = self.indexer.topk
            per_query = max(kept * width, heads * kept, rows)
        return max(1, min(self._config.sliding_window, SCRATCH // (batch * per_query)))

    def attend_block(self, q: mx.array, start: int, stop: int, context: Context) -> mx.array:
        """Attention of queries start..stop-1 of the chunk, q (B, stop - start, H, c)."""
        raw, raw_mask = self.visible_window(start, stop, context)
        positions = context.offset + mx.arange(start, stop)
        sources = [(raw, raw_mask)]
        if context.rows is not None and context.rows.shape[1]:
            visible = visible_rows(positions, context.rows.shape[1], self.ratio)
            if context.index_q is None:
                sources.append((context.form.kv.unpack(context.rows), visible))
            else:
                sources.append(self.selected_rows(start, stop, visible, context))
        return sink_attention(q, sources, self.attn_sink, self._config.head_dim**-0.5)

    def visible_window(self, start: int, stop: int, context: Context) -> tuple[mx.array, mx.array]:
        """Raw rows (B, K, c), float32, near queries start..stop-1 and which of them each sees, (L, K)."""
        before = self._config.sliding_window - 1
        first_key = max(0, context.offset - before)  # position of context.window's first row
        low = max(0, context.offset + start - before) - first_key
        high = context.offset + stop - first_key
        keys = first_key + mx.arange(low, high)
        queries = (context.offset + mx.arange(start, stop))[:, None]
        mask = (keys <= queries) & (keys >= queries - before)
        return context.form.kv.unpack(context.window[:, low:high]), mask

    def selected_rows(
        self, start: int, stop: int, visible: mx.array, context: Context
    ) -> tuple[mx.array, mx.array]:
        """The indexer's choice: rows (B, L, topk, c), float32, and which are visible, (B, L, topk)."""
        assert context.rows is not None and context.index_rows is not None
        assert context.index_q is not None and context.index_weights is not None
        scores = self.indexer.scores(
            context.index_q[:, start:stop],
            context.index_weights[:, start:stop],
            context.index_rows,
            context.form.index,
            SCRATCH,
        )
        chosen = self.indexer.select(scores, visible)
        mask = mx.take_along_axis(mx.broadcast_to(visible, scores.shape), chosen, axis=-1)
        flat = chosen.reshape(chosen.shape[0], -1, 1)
        rows = context.form.kv.unpack(mx.take_along_axis(context.rows, flat, axis=1))
        return rows.reshape(*chosen.shape, -1), mask

    def output(self, out: mx.array) -> mx.array:
        """Heads (B, L, H, c) -> (B, L, D): each group of heads through wo_a, all through wo_b."""
        batch, length = out.shape[:2]
        grouped = out.reshape(batch, length, self._config.o_groups, -1)
        return self.wo_b(self.wo_a(grouped).reshape(batch, length, -1))


def visible_rows(positions: mx.array, rows: int, ratio: int) -> mx.array:
    """bool (L, rows): row j from its own last token on, j < (position + 1) // ratio."""
    return mx.arange(rows) < ((positions + 1) // ratio)[:, None]


def sink_attention(
    q: mx.array, sources: list[tuple[mx.array, mx.array]], sink: mx.array, scale: float
) -> mx.array:
    """One softmax over all sources and a sink; float32 inside.

    q: (B, L, H, c). A source is rows (B, K, c) with a mask (L, K), shared by the queries, or rows
    (B, L, K, c) with a mask (B, L, K), each query's own; rows are keys and values. The sink (H,) is
    a logit that only enlarges the denominator. Returns (B, L, H, c) in q's type.
    """
    wide = q.astype(mx.float32) * scale
    sources = [(rows.astype(mx.float32), mask) for rows, mask in sources]
    logits = [masked(_products(wide, mx.swapaxes(rows, -1, -2)), mask) for rows, mask in sources]
    sinks = mx.broadcast_to(sink.astype(mx.float32)[:, None], (*q.shape[:3], 1))
    weights = mx.softmax(mx.concatenate([*logits, sinks], axis=-1), axis=-1, precise=True)
    out, start = mx.zeros_like(wide), 0
    for rows, _ in sources:
        part = weights[..., start : start + rows.shape[-2]]
        out, start = out + _products(part, rows), start + rows.shape[-2]
    return out.astype(q.dtype)


def masked(logits: mx.array, mask: mx.array) -> mx.array:
    """logits (B, L, H, K) with -inf where mask (L, K) or (B, L, K) is False."""
    return mx.where(mask[..., None, :], logits, -mx.inf)


def _products(x: mx.array, rows: mx.array) -> mx.array:
    """x (B, L, H, i) times rows (B, i, o), shared by the queries, or (B, L, i, o)."""
    if rows.ndim == 4:
        return x @ rows
    batch, length, heads, width = x.shape
    return (x.reshape(batch, length * heads, width) @ rows).reshape(batch, length, heads, -1)
