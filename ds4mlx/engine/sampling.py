"""The next token from logits: temperature, then top-k, top-p and min-p, then one draw.

A Sampler only describes how tokens are drawn. What a draw gives depends on the logits and a key, and
the key on a seed and the token's position; MLX's global random state is neither read nor changed.
"""

import hashlib
import math
from dataclasses import dataclass
from numbers import Real

import mlx.core as mx

from ds4mlx.engine.penalties import Penalties
from ds4mlx.engine.requests import check_count
from ds4mlx.engine.shares import before_share, halvings, limit
from ds4mlx.errors import DataError

# Bounds of 1 / temperature, so that float32 neither loses a finite one nor divides by zero.
_COLDEST, _HOTTEST = 1e30, 1e-30


def log_probs(logits: mx.array) -> mx.array:
    """Logits (..., vocab) of any float type -> log-probabilities (..., vocab), float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def draw_key(seed: int, position: int) -> mx.array:
    """The key with which the token at a position of a sequence is drawn."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8)
    return mx.random.key(int.from_bytes(digest.digest()))


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn; the filters apply in this order, each to what the one before left.

    temperature: divides the logits; 0 takes the most probable token, the lowest id among equals,
        and ignores the rest.
    top_k: keeps that many most probable tokens; 0, or the vocabulary's size and more, keeps all.
    top_p: keeps the fewest most probable tokens that reach this share together.
    min_p: keeps tokens at least this fraction as probable as the most probable one.
    seed: makes a sequence's draws repeatable; with None each sequence chooses one.
    penalties: what a sequence takes from its logits before they come here, also at temperature 0.

    The most probable token always stays. Raises DataError, naming the option, for values out of
    range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    penalties: Penalties | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, math.inf)
        _check_number("top_p", self.top_p, 1)
        _check_number("min_p", self.min_p, 1)
        check_count("top_k", self.top_k)
        if self.seed is not None:
            check_count("seed", self.seed, end=1 << 64)

    def __call__(self, logits: mx.array, key: mx.array) -> mx.array:
        """Logits (B, vocab), each row with a finite maximum -> one token per row, int32 (B,).

        Nothing is computed before the result is evaluated, and all of it on the device. The
        vocabulary is sorted only for top_k and top_p.
        """
        if self.temperature == 0:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        if self.top_p == 1 and not 0 < self.top_k < logits.shape[-1]:
            kept = self._scaled(logits)
            if self.min_p:
                kept = mx.where(self._probable(logits), kept, -mx.inf)
            return mx.random.categorical(kept, key=key).astype(mx.int32)
        tokens, kept = self._ordered(logits)
        drawn = mx.random.categorical(kept, key=key)
        return mx.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(mx.int32)

    def log_probs(self, logits: mx.array) -> mx.array:
        """What a draw chooses from, at a temperature above 0.

        Logits (B, vocab) -> log-probabilities (B, vocab) float32, -inf for those filtered out.
        """
        tokens, kept = self._ordered(logits)
        none = mx.full(logits.shape, -mx.inf)
        tokens = tokens[:, : kept.shape[-1]]
        return log_probs(mx.put_along_axis(none, tokens, kept, axis=-1))

    def candidates(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """What a draw chooses from, at a temperature above 0.

        Logits (B, vocab) -> tokens (B, vocab) int32, most probable first, and their
        log-probabilities (B, vocab) float32, -inf for those filtered out.
        """
        tokens, kept = self._ordered(logits)
        beyond = tokens.shape[-1] - kept.shape[-1]
        kept = mx.pad(kept, [(0, 0), (0, beyond)], constant_values=mx.array(-mx.inf))
        return tokens.astype(mx.int32), log_probs(kept)

    def _ordered(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Tokens (B, vocab), most probable first, and the scaled logits of the first `top_k`.

        Those are float32 (B, n), -inf where the other filters rule them out.
        """
        tokens = mx.argsort(-logits, axis=-1)
        most = min(self.top_k or logits.shape[-1], logits.shape[-1])
        ordered = mx.take_along_axis(logits, tokens[:, :most], axis=-1)
        kept = self._scaled(ordered)
        if self.top_p < 1 or self.min_p:
            kept = mx.where(self._probable(ordered), kept, -mx.inf)
        return tokens, kept

    def _probable(self, logits: mx.array) -> mx.array:
        """Which of logits (B, n), in falling order if `top_p` asks, that and `min_p` leave."""
        logits = logits.astype(mx.float32)
        distances = halvings(logits, mx.max(logits, axis=-1, keepdims=True), self._coldness())
        stay = distances <= limit(self.min_p)
        if self.top_p < 1:
            first = mx.arange(logits.shape[-1]) == 0
            stay &= before_share(distances, self.top_p) | first
        return stay

    def _coldness(self) -> float:
        return min(max(1 / self.temperature, _HOTTEST), _COLDEST)

    def _scaled(self, logits: mx.array) -> mx.array:
        """The logits over the temperature, shifted first so that the largest is 0."""
        logits = logits.astype(mx.float32)
        return (logits - mx.max(logits, axis=-1, keepdims=True)) * self._coldness()


def _check_number(option: str, value: float, most: float) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= most or value == math.inf:
        bounds = "at least 0" if most == math.inf else f"from 0 to {most}"
        raise DataError(f"{option} must be a number {bounds}, not {value!r:.80}")
