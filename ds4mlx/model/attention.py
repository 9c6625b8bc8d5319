"""Attention of one block: a sliding window of raw rows, and what stands beside it.

One KV head whose row is key and value at once (MQA). A block of ratio 0 sees the window only, the
others (`compressed_attention.py`) compressed rows too; one softmax with a sink spans both. Here and
there alone a batch's spans meet their states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.layer import chunk_attention, turned_rows
from ds4mlx.custom_kernels.layer.plain import Angles, rms_norm, rotate
from ds4mlx.custom_kernels.layer.sink import Source, sink_attention
from ds4mlx.model.batch import Batch, Span
from ds4mlx.model.linear import GroupedLinear, Linear, RMSNorm
from ds4mlx.model.look import Look
from ds4mlx.model.module import Module
from ds4mlx.model.taps import ATTENDED, inside, site_of, tap
from ds4mlx.state.layer import LayerState
from ds4mlx.state.rounding import Rounding
from ds4mlx.state.row_forms import PlainRows, RowForm

# Elements of scores, or of gathered rows, that exist at a time: bounds the scratch of a prefill.
SCRATCH = 1 << 24


@dataclass(frozen=True)
class Selection:
    """What the indexer scores a span's queries by."""

    form: RowForm  # of the index rows
    rows: mx.array  # (R, .) index rows, one for each compressed row
    queries: mx.array  # (L, index heads, index width)
    weights: mx.array  # (L, index heads)


@dataclass(frozen=True)
class Context:
    """What the queries of one span may attend to."""

    span: Span  # of the queries
    form: RowForm  # of the rows below
    window: mx.array  # (before + L, .), ends with the span's own rows
    rows: mx.array  # (R, .) compressed rows so far, those that the span completes included
    selection: Selection | None = None  # where there are more rows than are kept


class Attention(Module):
    """Projections, the window, the core attention, and the grouped output projection."""

    ratio = 0

    def __init__(self, config: ModelConfig, block: int, rounding: Rounding):
        super().__init__()
        self._site = site_of(config, block) + "attn."
        heads, dim, rank = config.num_attention_heads, config.head_dim, config.q_lora_rank
        self.rounding: Rounding = rounding
        self._config = config
        self.wq_a = Linear(rank, config.hidden_size)
        self.q_norm = RMSNorm(rank, config.rms_norm_eps)
        self.wq_b = Linear(heads * dim, rank)
        self.wkv = Linear(dim, config.hidden_size)
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps)
        self.attn_sink = mx.zeros((heads,))
        groups, low_rank = config.o_groups, config.o_lora_rank
        self.wo_a = GroupedLinear(groups, low_rank, heads * dim // groups)
        self.wo_b = Linear(config.hidden_size, groups * low_rank)

    def __call__(self, x: mx.array, batch: Batch, states: Sequence[LayerState]) -> mx.array:
        """x (N, D), normed -> (N, D); `states` are this block's, one for each span."""
        angles = batch.angles[self.ratio]
        qr = tap(self._site, "query_latent", self.q_norm(self.wq_a(x)))
        q = self.queries(qr, angles)
        contexts = self.contexts(x, qr, batch, states)
        spans = zip(batch.spans, contexts, strict=True)
        outs = [self.attend(q[span.tokens], context, angles) for span, context in spans]
        return self.output(outs[0] if len(outs) == 1 else mx.concatenate(outs))

    def queries(self, qr: mx.array, angles: Angles) -> mx.array:
        """Queries from the query latent qr (N, rank): unit RMS per head, rotated (N, H, c)."""
        q = self.wq_b(qr).reshape(len(qr), -1, self._config.head_dim)
        layout, eps = PlainRows(q.shape[-1], q.dtype).layout, self._config.rms_norm_eps
        if turned_rows.takes(q, angles, layout, normed="unit"):
            return turned_rows.by_kernel(q, angles, layout, normed="unit", eps=eps)
        return rotate(rms_norm(q, None, eps), angles)

    def window_rows(self, x: mx.array, angles: Angles, form: RowForm) -> mx.array:
        """Raw KV rows of tokens x: normed, rotated, laid out; (N, .)."""
        kv, norm = self.wkv(x), self.kv_norm
        hidden = inside(self._site, "window_rows")
        if hidden is None and turned_rows.takes(kv, angles, form.layout, normed="weighted"):
            own = {"norm": norm.weight, "eps": norm.eps}
            return turned_rows.by_kernel(kv, angles, form.layout, normed="weighted", **own)
        return form.pack(tap(self._site, "window_rows", rotate(norm(kv), angles)))

    def contexts(
        self, x: mx.array, qr: mx.array, batch: Batch, states: Sequence[LayerState]
    ) -> list[Context]:
        """Extend each span's state by its tokens, and say what their queries may attend to."""
        rows, made = self.window_rows(x, batch.angles[self.ratio], states[0].form), []
        for span, state in zip(batch.spans, states, strict=True):
            window = state.window.extend(rows[span.tokens], state.before, span.step)
            made.append(Context(span, state.form, window, window[:0]))
        return made

    def attend(self, q: mx.array, context: Context, angles: Angles) -> mx.array:
        """Core attention of a span's q (L, H, c): (L, H, c), turned back; angles: of all tokens."""
        cos, sin = (each[context.span.tokens] for each in angles)
        arrays = q, self.attn_sink, context.window, context.rows
        options = {"ratio": self.ratio, "form": context.form}
        hidden = inside(self._site, *ATTENDED)
        if hidden is None and chunk_attention.takes(*arrays, (cos, sin), **options):
            start, before = context.span.step.offset, self._config.sliding_window - 1
            options |= {"start": start, "before": before}
            return chunk_attention.by_kernel(*arrays, self.chosen(context), (cos, sin), **options)
        return rotate(self.attend_blocks(q, context), (cos, sin), inverse=True)

    def chosen(self, context: Context) -> mx.array | None:
        """The compressed rows that each query attends to, int (L, topk); None for all it sees."""
        return None

    def attend_blocks(self, q: mx.array, context: Context) -> mx.array:
        """Core attention of q (L, H, c) by plain operations, a block of queries at a time."""
        length, outs = len(q), []
        size = min(self._config.sliding_window, SCRATCH // self.scratch(context))
        for start in range(0, length, max(1, size)):
            stop = min(start + max(1, size), length)
            block = q[start:stop]
            if outs:  # in turn, so that one block's scores are alive at a time
                block = mx.depends([block], outs[-1:])[0]
            outs.append(self.attend_block(block, start, stop, context))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)

    def scratch(self, context: Context) -> int:
        """About the elements that attention of one query makes."""
        rows = 2 * self._config.sliding_window + len(context.rows)
        return self._config.num_attention_heads * rows

    def attend_block(self, q: mx.array, start: int, stop: int, context: Context) -> mx.array:
        """Attention of queries start..stop-1 of the span, q (stop - start, H, c)."""
        look = Look(self._site, context.span, self._config.sliding_window, start, stop)
        rows, mask = self.visible_window(start, stop, context)
        sources = [(rows, look.window(mask))]
        if len(context.rows):
            positions = context.span.step.offset + mx.arange(start, stop)
            visible = visible_rows(positions, len(context.rows), self.ratio)
            visible = tap(self._site, "visible", visible, context.span)
            sources.append(self.compressed(start, stop, visible, context, look))
        elif self.ratio:
            look.nothing(len(self.attn_sink), self._config.index_topk if self.ratio == 4 else None)
        scale = self._config.head_dim**-0.5
        return sink_attention(q, sources, self.attn_sink, scale, look.weights)

    def visible_window(self, start: int, stop: int, context: Context) -> Source:
        """Raw rows (K, c), float32, near queries start..stop-1 and which of them each sees, (L, K)."""
        before = self._config.sliding_window - 1
        first_key = max(
            0, context.span.step.offset - before
        )  # position of context.window's first row
        low = max(0, context.span.step.offset + start - before) - first_key
        high = context.span.step.offset + stop - first_key
        keys = first_key + mx.arange(low, high)
        queries = (context.span.step.offset + mx.arange(start, stop))[:, None]
        mask = (keys <= queries) & (keys >= queries - before)
        return context.form.unpack(context.window[low:high]), mask

    def compressed(
        self, start: int, stop: int, visible: mx.array, context: Context, look: Look
    ) -> Source:
        """Compressed rows, float32, for queries start..stop-1, and which of them each sees."""
        look.all_rows(visible)
        return context.form.unpack(context.rows), visible

    def output(self, out: mx.array) -> mx.array:
        """Heads (N, H, c) -> (N, D): each group of heads through wo_a, all through wo_b."""
        grouped = out.reshape(len(out), self._config.o_groups, -1)
        return self.wo_b(self.wo_a(grouped).flatten(1))


def visible_rows(positions: mx.array, rows: int, ratio: int) -> mx.array:
    """bool (L, rows): row j from its own last token on, j < (position + 1) // ratio."""
    return mx.arange(rows) < ((positions + 1) // ratio)[:, None]
