"""What GGUF's block formats share: planes out of blocks, and products by decoding."""

from abc import abstractmethod

import mlx.core as mx
import numpy as np

from ds4mlx.formats.base import Format, Planes
from ds4mlx.formats.decoding import decoded_matmul, expert_by_expert

# Up to this many (row, expert) pairs each decodes its own matrix; beyond, each expert is decoded once.
PAIRS = 16


class BlockFormat(Format):
    """A format of fixed-size blocks along the input; subclasses give the layout and `decode`."""

    block_bytes: int  # of a GGUF block

    @abstractmethod
    def split(self, blocks: np.ndarray) -> dict[str, np.ndarray]:
        """GGUF blocks uint8 (..., blocks, block_bytes) -> planes (..., blocks, elements)."""

    def from_blocks(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of raw GGUF blocks, uint8 (..., bytes) -> planes (..., elements), values unchanged."""
        blocks = raw.reshape(*raw.shape[:-1], -1, self.block_bytes)
        return {
            plane: np.ascontiguousarray(array).reshape(*raw.shape[:-1], -1)
            for plane, array in self.split(blocks).items()
        }

    def matmul(self, planes: Planes, x: mx.array) -> mx.array:
        return decoded_matmul(self, planes, x)

    def gather(self, planes: Planes, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        if experts.size <= PAIRS:
            return self.matmul({plane: array[experts] for plane, array in planes.items()}, x)
        return expert_by_expert(self, planes, x, experts)


def spread(scale: mx.array, weights: int) -> mx.array:
    """A scale per group (..., groups) as one per weight, float32."""
    return mx.repeat(scale.astype(mx.float32), weights, axis=-1)


def view(raw: np.ndarray, dtype: type) -> np.ndarray:
    """Bytes uint8 (..., n) as elements of another type."""
    return np.ascontiguousarray(raw).view(dtype)
