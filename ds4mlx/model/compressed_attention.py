"""Attention to compressed rows beside the window: HCA to all of them, CSA to those the indexer selects.

HCA (ratio 128) compresses heavily and sees every row; CSA (ratio 4) has 32 times as many, of which
each query attends to the `index_topk` best.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.layer.sink import Source
from ds4mlx.model import attention
from ds4mlx.model.attention import Attention, Context, Selection
from ds4mlx.model.batch import Batch, Span
from ds4mlx.model.compressor import Compressor
from ds4mlx.model.indexer import Indexer
from ds4mlx.model.look import Look
from ds4mlx.model.taps import inside, tap
from ds4mlx.state.layer import LayerState
from ds4mlx.state.rounding import Rounding


class HeavyAttention(Attention):
    """HCA: all compressed rows, one of every 128 tokens, stand beside the window."""

    ratio = 128

    def __init__(self, config: ModelConfig, block: int, rounding: Rounding):
        super().__init__(config, block, rounding)
        self.compressor = Compressor(config, config.head_dim, self.ratio)

    def contexts(
        self, x: mx.array, qr: mx.array, batch: Batch, states: Sequence[LayerState]
    ) -> list[Context]:
        """As of the window, with the compressed rows."""
        made, projected = [], self.compressor.project(x, batch.positions)
        windows = super().contexts(x, qr, batch, states)
        for context, span, state in zip(windows, batch.spans, states, strict=True):
            part = state.compressors[0]
            rows = self.compressor(projected[span.tokens], span, part, x.dtype)
            rows = part.rows.extend(rows, span.step)
            made.append(replace(context, rows=tap(self._site, "rows", rows, span)))
        return made


class SparseAttention(HeavyAttention):
    """CSA: of the compressed rows, one of every 4 tokens, those that the indexer selects."""

    ratio = 4

    def __init__(self, config: ModelConfig, block: int, rounding: Rounding):
        super().__init__(config, block, rounding)
        self.indexer = Indexer(config, rounding)

    def contexts(
        self, x: mx.array, qr: mx.array, batch: Batch, states: Sequence[LayerState]
    ) -> list[Context]:
        """As of HCA; where there are more rows than are kept, with what to select them by."""
        indexer = self.indexer
        projected = indexer.compressor.project(x, batch.positions)
        wide = super().contexts(x, qr, batch, states)
        rows = [
            self.index_rows(projected[span.tokens], span, state, x.dtype)
            for span, state in zip(batch.spans, states, strict=True)
        ]
        wanted = inside(self._site, "indexer.scores") is not None
        selecting = [len(each) > indexer.topk or (wanted and len(each) > 0) for each in rows]
        if not any(selecting):
            return wide
        queries = indexer.queries(qr, batch.angles[self.ratio])
        weights, made = indexer.head_weights(x), []
        sides = zip(wide, batch.spans, states, rows, selecting, strict=True)
        for context, span, state, each, selects in sides:
            own = queries[span.tokens], weights[span.tokens]
            selection = Selection(state.compressors[1].form, each, *own)
            made.append(replace(context, selection=selection) if selects else context)
        return made

    def index_rows(
        self, projected: mx.array, span: Span, state: LayerState, dtype: mx.Dtype
    ) -> mx.array:
        """Index rows of a span so far, as laid out, (R, .); projected: by the indexer's compressor."""
        rows = self.indexer.extend(projected, span, state.compressors[1], dtype)
        return tap(self._site, "indexer.rows", rows, span)

    def scratch(self, context: Context) -> int:
        """About the elements that attention of one query makes."""
        if context.selection is None:
            return super().scratch(context)
        kept, heads = self.indexer.topk, self._config.num_attention_heads
        return max(kept * self._config.head_dim, heads * kept, len(context.rows))

    def chosen(self, context: Context) -> mx.array | None:
        """The indexer's choice, where there is one; some of it may be invisible."""
        selection, made = context.selection, []
        if selection is None:
            return None
        queries, rows, length = selection.queries, selection.rows, len(selection.queries)
        launches = self.indexer.launches(queries, rows, selection.form)
        size = max(1, attention.SCRATCH // len(rows))
        for start in range(0, length, size):
            stop, first = min(start + size, length), context.span.step.offset + start
            if made:  # in turn, so that one block's scores are alive at a time
                queries = mx.depends([queries], made[-1:])[0]
            own = queries[start:stop], selection.weights[start:stop], rows, selection.form
            if launches:
                made.append(self.indexer.best(*own, first))
            else:
                visible = attention.visible_rows(
                    first + mx.arange(stop - start), len(rows), self.ratio
                )
                made.append(
                    self.indexer.select(self.indexer.scores(*own, attention.SCRATCH), visible)
                )
            submit = context.span.step.submit
            if submit is not None and size < length:  # a device gives back no scores before that
                submit(made[-1])
        return mx.concatenate(made).astype(mx.int32)

    def compressed(
        self, start: int, stop: int, visible: mx.array, context: Context, look: Look
    ) -> Source:
        """All rows; or the indexer's choice: (L, topk, c), float32, and which are visible."""
        selection, scores = context.selection, None
        if selection is not None:
            queries, weights = selection.queries[start:stop], selection.weights[start:stop]
            scores = self.indexer.scores(
                queries, weights, selection.rows, selection.form, attention.SCRATCH
            )
            scores = look.scores(scores, visible)
        if scores is None or len(context.rows) <= self.indexer.topk:
            visible = look.kept(visible, self.indexer.topk)
            return super().compressed(start, stop, visible, context, look)
        chosen = self.indexer.select(scores, visible)
        visible = mx.broadcast_to(visible, scores.shape)
        chosen, mask = look.chosen(chosen, mx.take_along_axis(visible, chosen, axis=-1), visible)
        rows = context.form.unpack(context.rows[chosen.flatten()])
        return rows.reshape(*chosen.shape, -1), mask


def attention_of(config: ModelConfig, block: int, rounding: Rounding) -> Attention:
    """The attention of a block, of the class that its compression ratio asks for."""
    kinds = {kind.ratio: kind for kind in (Attention, HeavyAttention, SparseAttention)}
    return kinds[config.ratio(block)](config, block, rounding)
