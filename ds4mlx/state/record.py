"""Boundary records as bytes: what the state at a position holds beside the rows that only grow.

Layer by layer: the window rows that the next token sees; then for the main compressor and the
indexer's, where there are: of the group before the open one only the lane that the next row uses
(ratio 4), and the projections of the open group. Everything as it stands in the state, nothing is
rounded.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from ds4mlx.state.buffers import Recent
from ds4mlx.state.layer import CompressorState, LayerState
from ds4mlx.state.row_forms import row_bytes
from ds4mlx.state.step import Step

FLOAT = mx.float32.size


def layer_record(layers: Sequence[LayerState], tokens: int) -> mx.array:
    """The record after `tokens` tokens, bytes (n,), read off the buffers, which must reach it."""
    return _record(layers, lambda part: part.between(part.needed(tokens), tokens), tokens)


def step_record(layers: Sequence[LayerState], step: Step, boundary: int) -> mx.array:
    """The same from the pieces of a step that has passed the boundary."""
    return _record(layers, lambda part: step.pieces[part, boundary], boundary)


def record_bytes(layers: Sequence[LayerState], tokens: int) -> int:
    """Bytes of the record after `tokens` tokens."""
    total = 0
    for layer in layers:
        total += (tokens - layer.needed(tokens)) * row_bytes(layer.form)
        for part in layer.compressors:
            total += sum(_sizes(part, tokens))
    return total


def load_record(layers: Sequence[LayerState], record: mx.array, tokens: int) -> None:
    """Give the layers' windows and recent projections what the record (n,) says."""
    at = 0

    def take(nbytes: int, dtype: mx.Dtype, *shape: int) -> mx.array:
        nonlocal at
        piece = mx.contiguous(record[at : at + nbytes])
        at += nbytes
        return piece.view(dtype).reshape(shape)

    for layer in layers:
        form, rows = layer.form, tokens - layer.needed(tokens)
        size = rows * row_bytes(form)
        layer.window.load(take(size, form.dtype, rows, form.elements), tokens)
        for part in layer.compressors:
            lane, open_ = _sizes(part, tokens)
            before = take(lane, mx.float32, -1 if lane else 0, 2, part.width)
            unread = mx.zeros((*before.shape[:-1], part.channels - part.width))
            pending = take(open_, mx.float32, -1 if open_ else 0, 2, part.channels)
            before = mx.concatenate([before, unread], axis=-1)
            part.recent.load(mx.concatenate([before, pending]), tokens)


def _record(
    layers: Sequence[LayerState], rows: Callable[[Recent], mx.array], tokens: int
) -> mx.array:
    pieces = []
    for layer in layers:
        pieces.append(rows(layer.window))
        for part in layer.compressors:
            span, closed = rows(part.recent), _closed(part, tokens)
            pieces += [span[:closed, :, : part.width], span[closed:]]
    return mx.concatenate([raw_bytes(piece) for piece in pieces])


def raw_bytes(piece: mx.array) -> mx.array:
    """The bytes of an array, uint8 (n,)."""
    if piece.size == 0:
        return mx.zeros((0,), mx.uint8)
    return mx.contiguous(piece).flatten().view(mx.uint8)


def _closed(part: CompressorState, tokens: int) -> int:
    """Needed projections that belong to the group before the open one."""
    return tokens // part.ratio * part.ratio - part.needed(tokens)


def _sizes(part: CompressorState, tokens: int) -> tuple[int, int]:
    """Bytes of the lane of the group before the open one, and of the open group."""
    lane = _closed(part, tokens) * 2 * part.width * FLOAT
    return lane, tokens % part.ratio * 2 * part.channels * FLOAT
