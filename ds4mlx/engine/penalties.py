"""Penalties: logits made smaller for tokens that a text has already.

Owns what they are, and the tokens of one sequence that they look back at.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import mlx.core as mx
import numpy as np

from ds4mlx.engine.requests import check_count
from ds4mlx.errors import DataError


@dataclass(frozen=True)
class Penalties:
    """What is taken from the logits of tokens before anything else is done with them.

    frequency, presence: OpenAI's, from -2 to 2. For every time that a token was drawn in the
        answer `frequency` is subtracted, and `presence` once if it was drawn at all.
    repetition: llama.cpp's, above 0; 1 does nothing. The logits of tokens among the last `window`
        ones, prompt included, are divided by it if positive and else multiplied; this comes first.

    Raises DataError, naming the penalty, for values out of range.
    """

    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    window: int = 64

    def __post_init__(self) -> None:
        for name in ("frequency", "presence"):
            value = getattr(self, name)
            if not _is_number(value) or not -2 <= value <= 2:
                raise DataError(f"{name} must be a number from -2 to 2, not {value!r:.80}")
        if not _is_number(self.repetition) or not 0 < self.repetition < math.inf:
            raise DataError(f"repetition must be a number above 0, not {self.repetition!r:.80}")
        check_count("window", self.window)


class LookBack:
    """The tokens of a sequence that penalties depend on."""

    def __init__(self, penalties: Penalties, prompt: Iterable[int]):
        self._penalties = penalties
        self._last = deque(prompt, maxlen=penalties.window)
        self._drawn: Counter[int] = Counter()

    def add(self, token: int) -> None:
        """Take a token that was drawn."""
        self._last.append(token)
        self._drawn[token] += 1

    def penalised(self, logits: mx.array) -> mx.array:
        """Logits (1, vocab) of any float type -> float32 (1, vocab). Nothing is evaluated."""
        logits, asked = logits.astype(mx.float32), self._penalties
        if asked.repetition != 1 and self._last:
            seen = mx.array(sorted(set(self._last)))[None]
            before = mx.take_along_axis(logits, seen, axis=-1)
            scale = mx.where(before > 0, 1 / asked.repetition, asked.repetition)
            logits = mx.put_along_axis(logits, seen, before * scale, axis=-1)
        if (asked.frequency or asked.presence) and self._drawn:
            tokens = mx.array(np.fromiter(self._drawn, np.int32))[None]
            counts = np.fromiter(self._drawn.values(), np.float32)
            less = mx.array(counts * np.float32(asked.frequency) + np.float32(asked.presence))
            before = mx.take_along_axis(logits, tokens, axis=-1)
            logits = mx.put_along_axis(logits, tokens, before - less, axis=-1)
        return logits


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
