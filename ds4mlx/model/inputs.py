"""What a model is called with: token ids of one or several sequences, and their decode states.

Everything is checked before anything moves. Only ids outside the vocabulary can pass: those of an
`mx.array` that brings one token a sequence to a state, since such ids usually have just been drawn
on the device, and reading them would keep the device waiting; and those of a call that is traced by
`mx.compile`, such as a step of training, which has no values yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.row_forms import StateForm

Tokens = mx.array | np.ndarray | Sequence
Cache = DecodeState | Sequence[DecodeState] | None


@dataclass(frozen=True)
class Inputs:
    """Token ids int32 (N,), one sequence after the other, and the length of each.

    `ragged`: the sequences came as a list, and what is computed of them is a list again.
    """

    ids: mx.array
    lengths: list[int]
    ragged: bool

    def shaped(self, flat: mx.array) -> mx.array | list[mx.array]:
        """What is known of each token, (N, ...), as the tokens came: (B, L, ...), or a list."""
        if not self.ragged:
            return mx.unflatten(flat, 0, (len(self.lengths), -1))
        return mx.split(flat, np.cumsum(self.lengths)[:-1].tolist())

    @property
    def last(self) -> mx.array:
        """The place of each sequence's last token, int (B,)."""
        return mx.array(np.cumsum(self.lengths) - 1)


def read_tokens(tokens: Tokens, vocabulary: int, one_each: bool) -> Inputs:
    """tokens: int (B, L), or a list of B sequences of any lengths. Raises DataError.

    one_each: ids of an mx.array with a token a sequence are taken as they are, see above.
    """
    if isinstance(tokens, mx.array | np.ndarray):
        if tokens.ndim != 2:
            raise DataError(f"tokens must be (B, L), not {_shape(tokens)}")
        rows, lengths = [tokens.reshape(-1)], [tokens.shape[1]] * tokens.shape[0]
    else:
        rows = [_row(row) for row in _listed(tokens)]
        lengths = [len(row) for row in rows]
    if not lengths:
        raise DataError("a call needs at least one sequence of tokens")
    if 0 in lengths:
        raise DataError(f"sequence {lengths.index(0)} of the call has no tokens")
    unread = one_each and max(lengths) == 1
    ids = [_checked(row, vocabulary, unread) for row in rows]
    flat = ids[0] if len(ids) == 1 else mx.concatenate(ids)
    return Inputs(flat, lengths, not isinstance(tokens, mx.array | np.ndarray))


def read_states(cache: Cache, count: int, form: StateForm, layers: int) -> list[DecodeState]:
    """The `count` states of a call to a model of this form and number of layers. Raises DataError."""
    states = [cache] if isinstance(cache, DecodeState) else list(cache or ())
    if len(states) != count:
        raise DataError(f"{count} sequences need {count} decode states, not {len(states)}")
    for place, state in enumerate(states):
        if not isinstance(state, DecodeState):
            raise DataError(f"cache {place} is a {type(state).__name__}, not a decode state")
        if state.form != form or len(state) != layers:
            raise DataError(f"cache {place} is not a state of this model: its rows are others")
    if len({id(state) for state in states}) < count:
        raise DataError("the same decode state was given for two sequences")
    return states


def _listed(tokens: Tokens) -> list:
    try:
        return list(tokens)
    except TypeError:
        kind = type(tokens).__name__
        raise DataError(f"tokens must be an array or a list of sequences, not {kind}") from None


def _row(row: object) -> mx.array | np.ndarray:
    """One sequence of a list."""
    try:
        ids = row if isinstance(row, mx.array) else np.asarray(row)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"a sequence of tokens must hold integers: {error}") from None
    if ids.ndim != 1:
        raise DataError(f"each sequence of a list must be (L,), not {_shape(ids)}")
    return ids if ids.size else np.zeros(0, np.int32)


def _checked(ids: mx.array | np.ndarray, vocabulary: int, unread: bool) -> mx.array:
    """The ids as int32. Raises DataError for another type, and for ids outside the vocabulary."""
    if isinstance(ids, mx.array):
        if not mx.issubdtype(ids.dtype, mx.integer):
            raise DataError(f"token ids must be integers, not {ids.dtype}")
        wide = None if unread else _values(ids)
        if wide is None:
            return ids.astype(mx.int32)
    else:
        if not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"token ids must be integers, not {ids.dtype}")
        wide = ids
    wrong = wide[(wide < 0) | (wide >= vocabulary)]
    if wrong.size:
        raise DataError(f"token id {wrong[0]} is outside the vocabulary of {vocabulary}")
    return mx.array(wide.astype(np.int32))


def _values(ids: mx.array) -> np.ndarray | None:
    """The ids on the host, or None where they have no values yet, while `mx.compile` traces."""
    try:
        return np.array(ids)
    except ValueError:
        return None


def _shape(array: mx.array | np.ndarray) -> str:
    return str(tuple(array.shape))
