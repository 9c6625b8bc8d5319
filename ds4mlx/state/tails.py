"""What a step of one token needs of a decode state: buffers that nobody writes to, and short tails.

All layers are in step: their tails begin at the same token. A tail that is full is moved into its
buffer before the step, so that there is room for a row of each. That changes where rows lie, and
nothing that can be asked of the state.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels.layer.buffers import Grown, Held, Recent, Tail, TailForm, begins
from ds4mlx.state import buffers
from ds4mlx.state.decode_state import RATIOS, DecodeState
from ds4mlx.state.layer import LayerState
from ds4mlx.state.step import Step


def settle(state: DecodeState) -> None:
    """Have all layers in step, with room in every tail."""
    torn = [layer for layer in state if not _whole(layer)]
    if torn or not _alike(state.recents):
        _begin(state, torn)
    elif state.recents[0].end - state.recents[0].settled == buffers.SPAN:
        pairs = [[part.buffer, part.newer] for part in state.recents]
        for part, buffer in zip(state.recents, _moved_up(pairs), strict=True):
            part.moved_up(buffer)
    for rows in state.rows.values():
        if rows and (rows[0].full or not _alike(rows)):
            _settle_rows(rows)


def _begin(state: DecodeState, torn: Sequence[LayerState]) -> None:
    """Have every layer's recent rows lie in buffers, and new tails where a layer has not all of its own.

    A tail that stays may hold compressed rows.
    """
    new = {id(part) for layer in torn for part in layer.parts}
    for rows in state.rows.values():
        if any(id(part) in new for part in rows):
            _settle_rows(rows)
    for part in state.recents:
        part.settle()
    for layer in torn:
        layer.empty_tails()


def place(state: DecodeState, number: int) -> np.ndarray:
    """Where the next token stands, int32 (8,): its position, where the tails of what every token makes
    begin, the number of the first row in those of ratio 4 and of ratio 128; its own among the tokens."""
    firsts = (rows[0].settled if rows else 0 for rows in state.rows.values())
    return np.array([state.offset, state.recents[0].settled, *firsts, number, 0, 0, 0], np.int32)


def arrays_of(state: DecodeState) -> list[mx.array]:
    """The tails of every layer of a settled state, then the buffers of all parts."""
    arrays = [layer.window.tail for layer in state.layers]
    arrays += [part.buffer for part in state.parts]
    return [array for array in arrays if array is not None]


def held_in(arrays: Sequence[mx.array], poolings: Sequence[int]) -> Iterator[Held]:
    """Of every layer what `arrays_of` a state gave, as kernels take it; each with so many compressors."""
    lying = iter(arrays[len(poolings) :])
    for tails, count in zip(arrays, poolings, strict=False):
        window, *pooled = (next(lying) for _ in range(1 + 2 * count))
        rooms = [buffers.SPAN, *(buffers.SPAN, buffers.TAIL) * count]
        shapes = zip(rooms, (window, *pooled), strict=True)
        forms = [TailForm((room, *each.shape[1:]), each.dtype) for room, each in shapes]
        own = [Tail(tails, *each) for each in zip(begins(forms), forms, strict=False)]
        parts = zip(pooled[::2], own[1::2], pooled[1::2], own[2::2], strict=True)
        pairs = [(Recent(old, near), Grown(full, far)) for old, near, full, far in parts]
        yield Held(Recent(window, own[0]), pairs)


def append(layers: Sequence[LayerState], tails: Sequence[mx.array], step: Step) -> None:
    """Have layers of a state take new tails, with a row of each that the token completes.

    Once a token for every part of every state: so it is done by few statements.
    """
    parts = [part for layer in layers for part in layer.parts]
    recents = [part for part in parts if isinstance(part, buffers.Recent)]
    own = [array for layer, array in zip(layers, tails, strict=True) for _ in layer.parts]
    step.arrays += tails
    step.changes += zip(parts, repeat("tail"), own)
    step.changes += zip(recents, repeat("end"), repeat(step.end))
    if step.end % min(RATIOS) == 0:
        rows = (part for part in parts if isinstance(part, buffers.Rows))
        full = (part for part in rows if step.end % part.ratio == 0)
        step.changes += [(part, "count", part.count + 1) for part in full]
    if step.boundaries:
        arrays = zip(parts, own, strict=True)
        made = {part: array for part, array in arrays if isinstance(part, buffers.Recent)}
        step.pieces |= {
            (part, step.end): part.piece(array, step.end) for part, array in made.items()
        }


def _whole(layer: LayerState) -> bool:
    """Whether every part of a layer has its tail in one array."""
    tails = layer.window.tail
    return tails is not None and all(part.tail is tails for part in layer.parts)


def _alike(parts: Sequence[buffers.Part]) -> bool:
    """Whether the tails of all begin at the same place."""
    return len({part.settled for part in parts}) <= 1


@mx.compile
def _moved_up(pairs: list[list[mx.array]]) -> list[mx.array]:
    """Buffers that end with the rows of full tails."""
    return [mx.concatenate([buffer[len(tail) :], tail]) for buffer, tail in pairs]


def _settle_rows(parts: Sequence[buffers.Rows]) -> None:
    """Append tails to their buffers: in place, so nothing that still runs may look at these."""
    written = [part for part in parts if part.tail is not None]
    if written:
        mx.synchronize()
    for part in parts:
        part.settle()
        if part in written:  # in turn, so that of buffers that grow one at a time is there twice
            mx.eval(part.arrays)
