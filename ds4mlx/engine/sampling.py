"""The next token from logits: temperature, then top-k, top-p and min-p, then one draw.

A Sampler draws from its own key; MLX's global random state is neither read nor changed.
"""

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from ds4mlx.errors import DataError

# Bounds of 1 / temperature, so that float32 neither loses a finite one nor divides by zero.
_COLDEST, _HOTTEST = 1e30, 1e-30


def log_probs(logits: mx.array) -> mx.array:
    """Logits (..., vocab) of any float type -> log-probabilities (..., vocab), float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn; the filters apply in this order, each to what the one before left.

    temperature: divides the logits; 0 takes the most probable token, the lowest id among equals,
        and ignores the rest.
    top_k: keeps that many most probable tokens; 0 keeps all.
    top_p: keeps the fewest most probable tokens that reach this share together.
    min_p: keeps tokens at least this fraction as probable as the most probable one.
    seed: makes the sequence of draws repeatable; None chooses one.

    The most probable token always stays. Raises DataError, naming the option, for values out of
    range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    _keys: Iterator[mx.array] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, math.inf)
        _check_number("top_p", self.top_p, 1)
        _check_number("min_p", self.min_p, 1)
        _check_count("top_k", self.top_k, math.inf)
        if self.seed is not None:
            _check_count("seed", self.seed, 1 << 64)
        seed = secrets.randbits(64) if self.seed is None else self.seed
        object.__setattr__(self, "_keys", _split_forever(seed))

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits (B, vocab), each row with a finite maximum -> one token per row, int32 (B,)."""
        if self.temperature == 0:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        if self._keeps_all():
            drawn = mx.random.categorical(self._scaled(logits), key=next(self._keys))
            return drawn.astype(mx.int32)
        tokens, kept = self.candidates(logits)
        drawn = mx.random.categorical(kept, key=next(self._keys))
        return mx.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]

    def candidates(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """What a draw chooses from, at a temperature above 0.

        Logits (B, vocab) -> tokens (B, vocab) int32, most probable first, and their
        log-probabilities (B, vocab) float32, -inf for those filtered out.
        """
        scaled = self._scaled(logits)
        tokens = mx.argsort(-scaled, axis=-1)
        kept = mx.take_along_axis(scaled, tokens, axis=-1)
        rank = mx.arange(kept.shape[-1])
        if self.top_k:
            kept = mx.where(rank < self.top_k, kept, -mx.inf)
        if self.top_p < 1:
            shares = mx.softmax(kept, axis=-1, precise=True)
            before = mx.cumsum(shares, axis=-1, inclusive=False)
            kept = mx.where((before < self.top_p) | (rank == 0), kept, -mx.inf)
        if self.min_p:
            kept = mx.where(kept >= kept[:, :1] + math.log(self.min_p), kept, -mx.inf)
        return tokens.astype(mx.int32), log_probs(kept)

    def _keeps_all(self) -> bool:
        return not self.top_k and self.top_p == 1 and not self.min_p

    def _scaled(self, logits: mx.array) -> mx.array:
        """The logits over the temperature, shifted first so that the largest is 0."""
        logits = logits.astype(mx.float32)
        shifted = logits - mx.max(logits, axis=-1, keepdims=True)
        return shifted * min(max(1 / self.temperature, _HOTTEST), _COLDEST)


def _split_forever(seed: int) -> Iterator[mx.array]:
    key = mx.random.key(seed)
    while True:
        key, drawn = mx.random.split(key)
        yield drawn


def _check_number(option: str, value: float, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= most or value == math.inf:
        bounds = "at least 0" if most == math.inf else f"from 0 to {most}"
        raise DataError(f"{option} must be a number {bounds}, not {value!r:.80}")


def _check_count(option: str, value: int, end: float) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
        bounds = "at least 0" if end == math.inf else f"from 0 to {end - 1}"
        raise DataError(f"{option} must be a whole number {bounds}, not {value!r:.80}")
