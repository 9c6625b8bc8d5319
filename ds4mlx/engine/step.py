"""One decoding step: a token into each sequence's state, and the next one of each drawn."""

from collections import abc

import mlx.core as mx

from ds4mlx.engine.interrupts import undivided
from ds4mlx.engine.not_finite import blame
from ds4mlx.engine.sequence import Sequence
from ds4mlx.engine.undone import undone_on_failure
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState, RewindError


def step(model: Model, sequences: abc.Sequence[Sequence]) -> tuple[list[int], mx.array]:
    """Feed each sequence the token it took last: their next tokens, and logits (B, vocab).

    Each sequence must lack exactly one token. The tokens are not taken yet; see `draw`. This waits
    for the device, which `Decoding` does not. A step that fails leaves every state as it was.
    """
    with undivided(), undone_on_failure([s.state for s in sequences]):
        logits = model.last_logits([s.pending for s in sequences], [s.state for s in sequences])
        return draw(sequences, logits), logits


def draw(sequences: abc.Sequence[Sequence], logits: mx.array) -> list[int]:
    """The sequences' next tokens, from logits (B, vocab); NOT_FINITE where those are no numbers.

    Everything is evaluated in one go.
    """
    rows = rows_of(logits)
    tokens = mx.concatenate([s.draw(row) for s, row in zip(sequences, rows, strict=True)])
    mx.eval(tokens, logits)
    return tokens.tolist()  # type: ignore[return-value]


def rows_of(logits: mx.array) -> list[mx.array]:
    """Logits (B, vocab), or streams, -> B rows (1, ...). Nothing is evaluated."""
    return mx.split(logits, len(logits)) if len(logits) > 1 else [logits]  # type: ignore[return-value]


def not_finite(model: Model, sequence: Sequence, after: int) -> DataError:
    """Why a draw after `after` tokens gave NOT_FINITE; the state is one before those tokens.

    Says which layer is at fault, by a second pass over the tokens, unless some are not known here.
    """
    state, before = sequence.state, sequence.state.offset
    cause = "no token can be drawn"
    if before >= sequence.first:
        cause += ": " + blame(model, sequence.pending, state)
    go_back(state, before)
    return DataError(f"the model's logits after {after} tokens are not finite numbers, so {cause}")


def go_back(state: DecodeState, tokens: int) -> None:
    """Rewind, if need be to less than `tokens`."""
    try:
        state.rewind(min(tokens, state.offset))
    except RewindError as error:
        state.rewind(error.below)
