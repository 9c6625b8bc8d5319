"""The bytes of a decode state that grow: the rows of every compressor, as they are.

Reads them off a state without a copy, and makes a state whose rows are to be filled in.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.state.buffers import Rows
from ds4mlx.state.changes import NAMELESS
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.kind import StateKind
from ds4mlx.state.row_forms import RowForm


@dataclass(frozen=True)
class Part:
    """The rows of one compressor; one row every `ratio` tokens."""

    ratio: int
    form: RowForm
    rows: Rows

    def view(self, start: int, end: int) -> np.ndarray:
        """The bytes of the rows that tokens start..end-1 complete: in place, if the rows have no tail."""
        first, last = start // self.ratio, end // self.ratio
        if self.rows.buffer is None or first == last:
            return np.empty(0, np.uint8)
        if self.rows.tail is None or last <= self.rows.settled:
            return _bytes(self.rows.buffer)[first:last].reshape(-1).view(np.uint8)
        pieces = (_bytes(piece) for piece in self.rows.between(first, last))
        return np.concatenate([piece.reshape(-1).view(np.uint8) for piece in pieces])


def _bytes(rows: mx.array) -> np.ndarray:
    """The rows as NumPy sees them."""
    if rows.dtype == mx.bfloat16:  # which NumPy does not know
        rows = rows.view(mx.uint16)
    return np.array(rows, copy=False)


def parts(state: DecodeState) -> list[Part]:
    """Every compressor's rows, in the order in which a segment holds them."""
    return [Part(c.ratio, c.form, c.rows) for layer in state for c in layer.compressors]


def check_storable(kind: StateKind, state: DecodeState, tokens: int) -> None:
    """DataError unless the state is of this kind, with at least `tokens` tokens."""
    if state.form != kind.form or len(state) != kind.config.num_hidden_layers:
        raise DataError("the state is not one of the store's model: it holds its rows otherwise")
    if not 1 <= tokens <= state.offset:
        raise DataError(f"cannot save {tokens} tokens of a state that holds {state.offset}")


def made_under(state: DecodeState) -> str:
    """The changes of its model under which a state was made. DataError: different ones, or nameless.

    What was made under an intervention, or partly under steering, is no state of any prompt.
    """
    (changed, *others) = state.made_under or {""}
    if others or changed == NAMELESS:
        raise DataError("the state was made while the model was being changed, and cannot be saved")
    return changed


def empty_rows(kind: StateKind, tokens: int) -> DecodeState:
    """A state with room for the rows of `tokens` tokens, not yet evaluated, and nothing else."""
    state = kind.make_cache()
    for part in parts(state):
        count = tokens // part.ratio
        if count:
            shape = (part.rows.capacity(count), part.form.elements)
            part.rows.load(mx.zeros(shape, part.form.dtype), count)
    return state


def complete(state: DecodeState, record: np.ndarray, tokens: int) -> None:
    """Make a state with all its rows the state after `tokens` tokens, by its boundary record."""
    state.load(mx.array(record), tokens)
    mx.eval(state.arrays)
