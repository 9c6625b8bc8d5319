"""What a step of one token needs of a decode state: buffers that nobody writes to, and short tails.

All layers are in step: their tails begin at the same token. A tail that is full is moved into its
buffer before the step, so that there is room for a row of each. That changes where rows lie, and
nothing that can be asked of the state.
"""

from collections.abc import Sequence
from itertools import repeat

import mlx.core as mx
import numpy as np

from ds4mlx.state.buffers import SPAN, Recent, Rows
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.step import Step

RATIOS = (4, 128)


def settle(state: DecodeState) -> None:
    """Have all layers in step, with room in every tail."""
    recents = [part for part in state.parts if isinstance(part, Recent)]
    _settle_recents(recents)
    for ratio in RATIOS:
        rows = _rows(state, ratio)
        if rows and (rows[0].full or not _alike(rows)):
            _settle_rows(rows)


def place(state: DecodeState, number: int) -> np.ndarray:
    """Where the next token stands, int32 (8,): its position, where the tails of what every token makes
    begin, the number of the first row in those of ratio 4 and of ratio 128; its own among the tokens."""
    firsts = (rows[0].settled if rows else 0 for rows in (_rows(state, r) for r in RATIOS))
    settled = state.layers[0].window.settled
    return np.array([state.offset, settled, *firsts, number, 0, 0, 0], np.int32)


def arrays_of(state: DecodeState) -> list[mx.array]:
    """Buffer and tail of every part of a settled state."""
    return [
        array for part in state.parts for array in (part.buffer, part.tail) if array is not None
    ]


def append(parts: Sequence[Recent | Rows], tails: Sequence[mx.array], step: Step) -> None:
    """Have parts of a state take new tails, with a row of each that the token completes."""
    end, changes = step.end, step.changes
    changes += zip(parts, repeat("tail"), tails)
    changes += [(part, "end", end) for part in parts if isinstance(part, Recent)]
    for part, tail in zip(parts, tails, strict=True):
        if isinstance(part, Rows):
            if end % part.ratio == 0:
                changes.append((part, "count", part.count + 1))
        elif step.boundaries:
            step.pieces[part, end] = part.piece(tail, end)


def _rows(state: DecodeState, ratio: int) -> list[Rows]:
    return [part for part in state.parts if isinstance(part, Rows) and part.ratio == ratio]


def _alike(parts: Sequence[Recent | Rows]) -> bool:
    """Whether all have tails that begin at the same place."""
    settled = parts[0].settled
    return all(part.tail is not None and part.settled == settled for part in parts)


def _settle_recents(recents: list[Recent]) -> None:
    if not _alike(recents):
        for part in recents:
            part.settle()
    elif recents[0].end - recents[0].settled == SPAN:
        for part, buffer in zip(recents, _moved_up([p.arrays for p in recents]), strict=True):
            part.moved_up(buffer)


@mx.compile
def _moved_up(pairs: list[list[mx.array]]) -> list[mx.array]:
    """Buffers that end with the rows of full tails."""
    return [mx.concatenate([buffer[len(tail) :], tail]) for buffer, tail in pairs]


def _settle_rows(parts: Sequence[Rows]) -> None:
    """Append tails to their buffers: in place, so nothing that still runs may look at these."""
    written = [part for part in parts if part.tail is not None]
    if written:
        mx.synchronize()
    for part in parts:
        part.settle()
        if part in written:  # in turn, so that of buffers that grow one at a time is there twice
            mx.eval(part.arrays)
