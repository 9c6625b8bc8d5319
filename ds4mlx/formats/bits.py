"""Codes of a few bits packed in 32-bit words, first code in the lowest bits; and sign bytes."""

import mlx.core as mx
import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes (..., n) below 2**bits -> uint32 (..., n * bits / 32)."""
    per_word = 32 // bits
    words = codes.reshape(*codes.shape[:-1], -1, per_word).astype(np.uint32)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    return np.bitwise_or.reduce(words << shifts, axis=-1)


def unpack(words: mx.array, bits: int) -> mx.array:
    """uint32 (..., n) -> codes uint32 (..., n * 32 / bits)."""
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)


def eight_signs(index: mx.array) -> mx.array:
    """7-bit sign indices uint32 (..., n) -> +-1 float32 (..., n, 8); an even number are minus."""
    parity = index ^ (index >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    bits = ((index | (parity << 7))[..., None] >> mx.arange(8, dtype=mx.uint32)) & 1
    return 1 - 2 * bits.astype(mx.float32)
