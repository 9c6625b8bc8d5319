"""What goes from one sublayer to the next: streams, and partial mixes for the next hyper-connection.

Every array that a launch makes or takes costs the host, so that those of one token lie in one.
"""

from typing import NamedTuple

import mlx.core as mx

from ds4mlx.custom_kernels.layer.hyper_pre import STREAMS

# What a launch finds in an array of one token, and what it leaves in another.
TAKE_STREAMS = """
    const device T* streams = carried;
"""
TAKE = f"""{TAKE_STREAMS}
    const device float* partial = (const device float*)(carried + 4 * WIDTH);
"""
MAKE = """
    device T* merged = made;
    device float* partial = (device float*)(made + 4 * WIDTH);
"""


class Apart(NamedTuple):
    """streams (B, n, D); partial float32 (B, P, rows + 1): sums over slices of channels, see `hyper_out`."""

    streams: mx.array
    partial: mx.array

    @property
    def dtype(self) -> mx.Dtype:
        """The streams' type."""
        return self.streams.dtype


class Together(NamedTuple):
    """The same of one token: streams and then partial mixes, (1, all) in the streams' type."""

    array: mx.array
    width: int  # D
    sums: int  # rows + 1

    @property
    def dtype(self) -> mx.Dtype:
        """The streams' type."""
        return self.array.dtype

    @property
    def slices(self) -> int:
        """P, of channels that sums are over."""
        floats = (self.array.shape[1] - STREAMS * self.width) * self.dtype.size // mx.float32.size
        return floats // self.sums

    @property
    def streams(self) -> mx.array:
        """They alone, (1, n, D)."""
        return self.array[:, : STREAMS * self.width].reshape(1, STREAMS, self.width)

    @property
    def partial(self) -> mx.array:
        """They alone, float32 (1, P, rows + 1)."""
        return self.array[:, STREAMS * self.width :].view(mx.float32).reshape(1, -1, self.sums)


Carried = Apart | Together


def carry(streams: mx.array, partial: mx.array) -> Carried:
    """Streams and their partial mixes as launches take them: those of one token in an array."""
    one = len(streams) == 1 and streams.shape[1] == STREAMS
    return together(streams, partial) if one else Apart(streams, partial)


def together(streams: mx.array, partial: mx.array) -> Together:
    """Those of one token in an array."""
    parts = [streams.flatten(1), partial.flatten(1).view(streams.dtype)]
    return Together(mx.concatenate(parts, axis=1), streams.shape[2], partial.shape[2])


def size(width: int, slices: int, sums: int, dtype: mx.Dtype) -> int:
    """Elements of an array of one token with so many sums for each of so many slices."""
    return STREAMS * width + slices * sums * (mx.float32.size // dtype.size)
