"""The K formats: super-blocks of 256 weights whose sub-blocks have small integer scales."""

import mlx.core as mx
import numpy as np

from ds4mlx.formats.base import Planes
from ds4mlx.formats.bits import pack, unpack
from ds4mlx.formats.blocks import BlockFormat, spread, view


class Q2_K(BlockFormat):
    """x = d s q - dmin m, 16 weights a sub-block, 2.625 bits a weight.

    Planes: `weight` uint32 (..., n / 16), `scales` uint8 (..., n / 16) with s in the low nibble and
    m in the high one, `d` float16 (..., n / 128) as pairs (d, dmin).
    """

    name, block, block_bytes = "q2_k", 256, 84
    layout = {"weight": ("U32", 2), "scales": ("U8", 0.5), "d": ("F16", 0.125)}

    def split(self, blocks: np.ndarray) -> dict[str, np.ndarray]:
        scales, packed, d = np.split(blocks, [16, 80], axis=-1)
        # byte 32 h + l holds weights 128 h + 32 t + l, t = 0..3, from its low bits up
        packed = packed.reshape(*packed.shape[:-1], 2, 1, 32)
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        codes = (packed >> shifts) & 3
        codes = codes.reshape(*blocks.shape[:-1], 256)
        return {"weight": pack(codes, 2), "scales": scales, "d": view(d, np.float16)}

    def decode(self, planes: Planes) -> mx.array:
        scales, d = planes["scales"], planes["d"].astype(mx.float32)
        scale = spread(d[..., 0::2], 16) * (scales & 15).astype(mx.float32)
        offset = spread(d[..., 1::2], 16) * (scales >> 4).astype(mx.float32)
        codes = unpack(planes["weight"], 2).astype(mx.float32)
        return spread(scale, 16) * codes - spread(offset, 16)


class Q4_K(BlockFormat):
    """x = d s q - dmin m, 32 weights a sub-block, 4.5 bits a weight.

    Planes: `weight` uint32 (..., n / 8); `scales` uint32 (..., 3 n / 256), the eight 6-bit s and m
    of a block packed as in GGUF; `d` float16 (..., n / 128) as pairs (d, dmin).
    """

    name, block, block_bytes = "q4_k", 256, 144
    layout = {"weight": ("U32", 4), "scales": ("U32", 0.375), "d": ("F16", 0.125)}

    def split(self, blocks: np.ndarray) -> dict[str, np.ndarray]:
        d, scales, packed = np.split(blocks, [4, 16], axis=-1)
        packed = packed.reshape(*packed.shape[:-1], 4, 1, 32)  # low nibbles first, then the high
        codes = (packed >> np.array([0, 4], np.uint8)[:, None]) & 15
        return {
            "weight": pack(codes.reshape(*blocks.shape[:-1], 256), 4),
            "scales": view(scales, np.uint32),
            "d": view(d, np.float16),
        }

    def decode(self, planes: Planes) -> mx.array:
        scales, d = six_bits(planes["scales"]), planes["d"].astype(mx.float32)
        scale = spread(d[..., 0::2], 8) * scales[..., 0, :].flatten(-2)
        offset = spread(d[..., 1::2], 8) * scales[..., 1, :].flatten(-2)
        codes = unpack(planes["weight"], 4).astype(mx.float32)
        return spread(scale, 32) * codes - spread(offset, 32)


class Q6_K(BlockFormat):
    """x = d s (q - 32), 16 weights a sub-block, 6.5625 bits a weight.

    Planes: `weight` uint32 (..., n / 8), the low four bits of q; `high` uint32 (..., n / 16), its
    two high bits; `scales` int8 (..., n / 16); `d` float16 (..., n / 256).
    """

    name, block, block_bytes = "q6_k", 256, 210
    layout = {"weight": ("U32", 4), "high": ("U32", 2), "scales": ("I8", 0.5), "d": ("F16", 0.0625)}

    def split(self, blocks: np.ndarray) -> dict[str, np.ndarray]:
        low, high, scales, d = np.split(blocks, [128, 192, 208], axis=-1)
        low = low.reshape(*low.shape[:-1], 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None]
        high = (
            high.reshape(*high.shape[:-1], 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        )
        shape = (*blocks.shape[:-1], 256)
        return {
            "weight": pack((low & 15).reshape(shape), 4),
            "high": pack((high & 3).reshape(shape), 2),
            "scales": scales.view(np.int8),
            "d": view(d, np.float16),
        }

    def decode(self, planes: Planes) -> mx.array:
        codes = unpack(planes["weight"], 4) | (unpack(planes["high"], 2) << 4)
        scale = spread(planes["d"], 16) * planes["scales"].astype(mx.float32)
        return spread(scale, 16) * (codes.astype(mx.float32) - 32)


def six_bits(words: mx.array) -> mx.array:
    """uint32 (..., 3 b) -> the s and m of the sub-blocks, float32 (..., b, 2, 8).

    Of the twelve bytes 0..3 hold s 0..3, 4..7 hold m 0..3 in six bits; 8..11 the low four bits of
    s 4..7 and m 4..7, whose high two bits are the top of the first eight bytes.
    """
    octets = unpack(words, 8).reshape(*words.shape[:-1], -1, 3, 4)
    s, m, rest = octets[..., 0, :], octets[..., 1, :], octets[..., 2, :]
    late_s, late_m = (rest & 15) | ((s >> 6) << 4), (rest >> 4) | ((m >> 6) << 4)
    both = [mx.concatenate([s & 63, late_s], -1), mx.concatenate([m & 63, late_m], -1)]
    return mx.stack(both, axis=-2).astype(mx.float32)
