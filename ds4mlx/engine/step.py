"""One decoding step: a token into each sequence's state, and the next one of each drawn."""

from collections import abc

import mlx.core as mx

from ds4mlx.engine.interrupts import undivided
from ds4mlx.engine.sequence import Sequence
from ds4mlx.model.model import Model


def step(model: Model, sequences: abc.Sequence[Sequence]) -> tuple[list[int], mx.array]:
    """Feed each sequence the token it took last: their next tokens, and logits (B, vocab).

    Each sequence must lack exactly one token. The tokens are not taken yet; see `draw`.
    """
    with undivided():
        parts = [model.last_logits(mx.array([s.pending]), s.state) for s in sequences]
        logits = mx.concatenate(parts)
        return draw(sequences, logits), logits


def draw(sequences: abc.Sequence[Sequence], logits: mx.array) -> list[int]:
    """The sequences' next tokens, from logits (B, vocab); NOT_FINITE where those are no numbers.

    Everything is evaluated in one go.
    """
    tokens = mx.concatenate([s.draw(logits[i : i + 1]) for i, s in enumerate(sequences)])
    mx.eval(tokens, logits)
    return tokens.tolist()  # type: ignore[return-value]
