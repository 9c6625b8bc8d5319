"""Weights for what a sublayer gives: post and comb of tokens, or of one, beside its products.

Every array that a launch makes costs the host, so that the launch that makes the products of one token
puts its weights into the same array.
"""

from typing import NamedTuple

import mlx.core as mx

from ds4mlx.custom_kernels.layer.hyper_pre import STREAMS

FLOATS = STREAMS + STREAMS * STREAMS  # post, and comb row by row

# Where a launch that merges finds them; `after` is the array.
FIND = """
    const device float* post = after + AFTER_AT;
    const device float* comb = post + 4;
"""


class After(NamedTuple):
    """Of tokens: post float32 (B, n) and comb float32 (B, n, n)."""

    post: mx.array
    comb: mx.array


class Beside(NamedTuple):
    """Of one token: the FLOATS of float32 `array` (1, all) from `begin` on."""

    array: mx.array
    begin: int

    @property
    def post(self) -> mx.array:
        """They alone, (1, n)."""
        return self.array[:, self.begin : self.begin + STREAMS]

    @property
    def comb(self) -> mx.array:
        """They alone, (1, n, n)."""
        own = self.array[:, self.begin + STREAMS : self.begin + FLOATS]
        return own.reshape(1, STREAMS, STREAMS)


def beside(array: mx.array, after: After) -> Beside:
    """The weights of one token at the end of a row (1, all)."""
    return Beside(
        mx.concatenate([array, after.post, after.comb.flatten(1)], axis=1), array.shape[1]
    )
