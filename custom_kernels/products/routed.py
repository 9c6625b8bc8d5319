"""Hidden values of the experts that tokens chose and, behind them in one array, which experts these are.

Every array that a launch makes or takes costs the host.
"""

from typing import NamedTuple

import mlx.core as mx


class Routed(NamedTuple):
    """`array` T (N k H + numbers,): of N tokens (N k, H) hidden values, then their experts' int32 (N, k)."""

    array: mx.array
    tokens: int  # N
    topk: int  # k

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the values."""
        return self.array.dtype

    @property
    def width(self) -> int:
        """H, the hidden values of an expert."""
        return self.array.size // (self.tokens * self.topk) - number_size(self.dtype)

    @property
    def hidden(self) -> mx.array:
        """The values alone, (N k, H)."""
        return self.array[: self.tokens * self.topk * self.width].reshape(-1, self.width)

    @property
    def chosen(self) -> mx.array:
        """The experts alone, int32 (N, k)."""
        numbers = self.array[self.tokens * self.topk * self.width :].view(mx.int32)
        return numbers.reshape(self.tokens, self.topk)


def number_size(dtype: mx.Dtype) -> int:
    """Values of a type that take as many bytes as an expert's number."""
    return mx.int32.size // dtype.size


def routed(hidden: mx.array, chosen: mx.array) -> Routed:
    """Hidden values (N k, H) of chosen experts int (N, k)."""
    numbers = chosen.astype(mx.int32).flatten().view(hidden.dtype)
    return Routed(mx.concatenate([hidden.flatten(), numbers]), *chosen.shape)
