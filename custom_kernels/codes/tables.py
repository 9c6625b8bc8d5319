"""Small constants that kernels take: grids of the IQ formats, and floats as template arguments."""

import struct
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.formats.iq import iq2_grid


def bits(value: float) -> int:
    """A float32 as the integer of the same bits, for a template argument."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


@lru_cache
def lut(format: str, eight: bool = False) -> mx.array:
    """uint32: a grid's 256 points as four words of two halves, columns (i, i + 4); else unused.

    For products of bytes two words of four bytes, and two of nothing. It is there, and not yet to be
    computed, since another thread than the first one to ask could not do that.
    """
    if not PACKINGS[format].lut:
        return mx.array(np.zeros(8, np.uint32))
    if eight:
        words = np.array(iq2_grid()).astype(np.uint8).view(np.uint32)
        return mx.array(np.pad(words, ((0, 0), (0, 2))).reshape(-1))
    points = np.array(iq2_grid()).astype(np.float16).view(np.uint16).astype(np.uint32)
    return mx.array((points[:, :4] | points[:, 4:] << 16).reshape(-1))
