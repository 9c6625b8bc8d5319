"""The IQ formats: groups of weights are points of a fixed grid, with signs and a small scale."""

from functools import lru_cache

import mlx.core as mx
import numpy as np
from gguf import quants

from ds4mlx.formats.base import Planes
from ds4mlx.formats.bits import eight_signs
from ds4mlx.formats.blocks import BlockFormat, spread, view


class IQ2_XXS(BlockFormat):
    """x = d (l + 1/2) / 4 * grid * sign, eight weights a grid point, 2.0625 bits a weight.

    Planes: `weight` uint32 (..., n / 16), two words for 32 weights: four grid indices, then four
    7-bit sign indices below a 4-bit l; `d` float16 (..., n / 256).
    """

    name, block, block_bytes = "iq2_xxs", 256, 66
    layout = {"weight": ("U32", 2), "d": ("F16", 0.0625)}

    def split(self, blocks: np.ndarray) -> dict[str, np.ndarray]:
        d, codes = np.split(blocks, [2], axis=-1)
        return {"weight": view(codes, np.uint32), "d": view(d, np.float16)}

    def decode(self, planes: Planes) -> mx.array:
        words = planes["weight"].reshape(*planes["weight"].shape[:-1], -1, 2)
        points, rest = words[..., 0], words[..., 1]
        indices = (points[..., None] >> mx.arange(0, 32, 8, dtype=mx.uint32)) & 255
        scale = spread(planes["d"], 8) * (0.5 + (rest >> 28).astype(mx.float32)) * 0.25
        values = iq2_grid()[indices] * four_signs(rest)
        return (scale[..., None, None] * values).flatten(-3)


class IQ3_XXS(BlockFormat):
    """x = d (l + 1/2) / 2 * grid * sign, four weights a grid point, 3.0625 bits a weight.

    Planes: `weight` uint32 (..., n / 16), four grid indices a word; `signs` uint32 (..., n / 32),
    four 7-bit sign indices below a 4-bit l; `d` float16 (..., n / 256).
    """

    name, block, block_bytes = "iq3_xxs", 256, 98
    layout = {"weight": ("U32", 2), "signs": ("U32", 1), "d": ("F16", 0.0625)}

    def split(self, blocks: np.ndarray) -> dict[str, np.ndarray]:
        d, codes, signs = np.split(blocks, [2, 66], axis=-1)
        return {
            "weight": view(codes, np.uint32),
            "signs": view(signs, np.uint32),
            "d": view(d, np.float16),
        }

    def decode(self, planes: Planes) -> mx.array:
        rest, words = planes["signs"], planes["weight"]
        indices = (words[..., None] >> mx.arange(0, 32, 8, dtype=mx.uint32)) & 255
        values = iq3_grid()[indices].reshape(*rest.shape, 4, 8) * four_signs(rest)
        scale = spread(planes["d"], 8) * (0.5 + (rest >> 28).astype(mx.float32)) * 0.5
        return (scale[..., None, None] * values).flatten(-3)


def four_signs(word: mx.array) -> mx.array:
    """+-1 of 32 weights from a word's low 28 bits: uint32 (..., g) -> float32 (..., g, 4, 8)."""
    return eight_signs((word[..., None] >> mx.arange(0, 28, 7, dtype=mx.uint32)) & 127)


@lru_cache(maxsize=1)
def iq2_grid() -> mx.array:
    """The 256 points of IQ2_XXS in {8, 25, 43}^8, float32 (256, 8)."""
    quants.IQ2_XXS.init_grid()
    return mx.array(np.asarray(quants.IQ2_XXS.grid, np.float32).reshape(256, 8))


@lru_cache(maxsize=1)
def iq3_grid() -> mx.array:
    """The 256 points of IQ3_XXS, float32 (256, 4)."""
    quants.IQ3_XXS.init_grid()
    return mx.array(np.asarray(quants.IQ3_XXS.grid, np.float32).reshape(256, 4))
