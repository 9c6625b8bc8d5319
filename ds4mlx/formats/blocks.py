"""What GGUF's block formats share: planes out of blocks, and products by decoding.

The products decode to float32 what they need and multiply: the reference that kernels are checked
against, and the path of devices without kernels.
"""

from abc import abstractmethod

import mlx.core as mx
import numpy as np

from ds4mlx.formats.base import Format, Planes

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
        weight = self.decode(planes)
        return (x.astype(mx.float32) @ mx.swapaxes(weight, -1, -2)).astype(x.dtype)

    def gather(self, planes: Planes, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        if experts.size <= PAIRS:
            return self.matmul({plane: array[experts] for plane, array in planes.items()}, x)
        return self._expert_by_expert(planes, x, experts)

    def _expert_by_expert(self, planes: Planes, x: mx.array, experts: mx.array) -> mx.array:
        """Like `gather`; needs the experts' ids on the host."""
        chosen = np.array(experts)
        x = mx.broadcast_to(x, (*experts.shape, *x.shape[-2:]))
        rows, flat = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
        order = np.argsort(flat, kind="stable")
        starts = np.flatnonzero(np.diff(flat[order], prepend=-1))
        parts: list[mx.array] = []
        for places in np.split(order, starts[1:]):
            one = {plane: array[int(flat[places[0]])] for plane, array in planes.items()}
            if parts:  # in turn, so that one decoded expert is alive at a time
                one["weight"] = mx.depends([one["weight"]], parts[-1:])[0]
            parts.append(self.matmul(one, rows[mx.array(places)]))
        out = mx.concatenate(parts)[mx.array(np.argsort(order))]
        return out.reshape(*chosen.shape, 1, -1)


def spread(scale: mx.array, weights: int) -> mx.array:
    """A scale per group (..., groups) as one per weight, float32."""
    return mx.repeat(scale.astype(mx.float32), weights, axis=-1)


def view(raw: np.ndarray, dtype: type) -> np.ndarray:
    """Bytes uint8 (..., n) as elements of another type."""
    return np.ascontiguousarray(raw).view(dtype)
