"""Q8_0: 32 int8 codes share one half-precision scale, 8.5 bits a weight."""

import mlx.core as mx
import numpy as np

from ds4mlx.formats.base import Planes
from ds4mlx.formats.blocks import BlockFormat, spread, view


class Q8_0(BlockFormat):
    """x = d q. Planes: `weight` int8 codes (..., n), `d` float16 (..., n / 32)."""

    name, block, block_bytes = "q8_0", 32, 34
    layout = {"weight": ("I8", 8), "d": ("F16", 0.5)}

    def split(self, blocks: np.ndarray) -> dict[str, np.ndarray]:
        return {"weight": blocks[..., 2:].view(np.int8), "d": view(blocks[..., :2], np.float16)}

    def decode(self, planes: Planes) -> mx.array:
        return spread(planes["d"], 32) * planes["weight"].astype(mx.float32)
