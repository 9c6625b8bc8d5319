"""How a row of the decode state lies in memory, as kernels are told."""

from typing import Literal, NamedTuple, Protocol

import mlx.core as mx


class RowLayout(NamedTuple):
    """A row of `width` channels as `elements` elements of type `dtype`.

    kind "plain": the channels themselves, of type `dtype`. "kv": words that hold `coded` E4M3 codes, a
    byte each, then an E8M0 exponent for every 64 of them, padding up to byte `head`, and the other
    channels in the activation type. "rounded": the values that an "index" row stands for. "index": words that hold E2M1 codes, two a byte with the earlier
    channel below, then an E8M0 exponent for every 32 channels.
    """

    kind: Literal["plain", "rounded", "kv", "index"]
    width: int
    elements: int
    dtype: mx.Dtype
    coded: int = 0
    head: int = 0


class Form(Protocol):
    """Rows of one layout, and how they are rounded into it and read back by plain operations."""

    @property
    def layout(self) -> RowLayout:
        """How a row lies."""
        ...

    def pack(self, rows: mx.array) -> mx.array:
        """Round rows (..., width) as the model does: (..., elements)."""
        ...

    def unpack(self, held: mx.array) -> mx.array:
        """The rows' values, float32 (..., width)."""
        ...
