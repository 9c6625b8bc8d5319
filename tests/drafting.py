"""Models whose drafts are taken now and then, and whether what is drawn is drawn rightly."""

from itertools import cycle

import mlx.core as mx
import numpy as np
from steering import tokens_of

from ds4mlx import load
from ds4mlx.engine.bypass import Bypass
from ds4mlx.engine.generation import answer
from ds4mlx.evaluation.weights import decode_weights, replace_values

# A chi-squared value that a right distribution over 8 tokens exceeds once in 100,000 times.
CRITICAL_7 = 35.26


class Flipping(Bypass):
    """Uses drafts and does not, in turn, so many tokens or rounds each time."""

    def __init__(self, *lengths):
        self._states = cycle([flag for length in lengths for flag in [length > 0] * abs(length)])
        self.drafting = next(self._states)

    def took(self, tokens, seconds):
        self.drafting = next(self._states)


def always():
    return Flipping(1)


def noisy(small_dir):
    """The small random model without rounding, where one token and several make the same logits.

    Its head knows five tokens only, so that a draft block of noise is right now and then.
    """
    loaded = load(small_dir, dtype=mx.float32, rounding="none")[0]
    decode_weights(loaded)
    known = np.isin(np.arange(288), [30, 70, 110, 150, 190])
    replace_values(loaded.head, loaded.head.weight * mx.array(known[:, None]))
    return loaded


def trained(embedded_dir):
    """The embedded model, whose draft block was trained, without rounding, and its tokenizer."""
    loaded, tokenizer = load(embedded_dir, dtype=mx.float32, rounding="none")
    decode_weights(loaded)
    return loaded, tokenizer


def tokens(model, sequence, drafts=0, bypass=None):
    return tokens_of(answer(model, sequence, drafts=drafts, bypass=bypass or always()))


def chi_squared(seen, expected):
    return ((seen - expected) ** 2 / expected).sum()
