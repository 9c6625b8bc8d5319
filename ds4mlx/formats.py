"""How weights are stored, and how activations are multiplied by them where they lie.

A format owns the planes (arrays) of a stored matrix, the product with one matrix, and the product
with chosen matrices of a stack. Weights are (out, in) or, stacked, (experts, out, in).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

Planes = Mapping[str, mx.array]
# Rows of a half-precision matrix that are widened to float32 at a time: bounds the scratch memory.
WIDEN_ROWS = 16384


class Format(Protocol):
    """What every storage format offers."""

    def empty(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """Unevaluated planes of a weight of this logical shape, to be replaced by loaded ones."""
        ...

    def matmul(self, planes: Planes, x: mx.array) -> mx.array:
        """x (..., in) -> (..., out), or for planes of (G, out, in): (G, n, in) -> (G, n, out)."""
        ...

    def gather(self, planes: Planes, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        """x (..., 1, in), experts int (...) -> (..., 1, out); `ordered`: experts ascend."""
        ...

    def decode(self, planes: Planes) -> mx.array:
        """The values that the products multiply by, float32, in the logical shape."""
        ...


@dataclass(frozen=True)
class Dense:
    """Plain values of one float type."""

    dtype: mx.Dtype

    def empty(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        return {"weight": mx.zeros(shape, self.dtype)}

    def matmul(self, planes: Planes, x: mx.array) -> mx.array:
        weight = planes["weight"]
        if weight.dtype == x.dtype or weight.ndim > 2:
            return (x @ mx.swapaxes(weight, -1, -2)).astype(x.dtype)
        return _widened_matmul(weight, x)

    def gather(self, planes: Planes, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        weight, wide = planes["weight"], x
        if weight.dtype != x.dtype or mx.default_device() == mx.cpu:
            weight, wide = weight.astype(mx.float32), x.astype(mx.float32)  # the CPU has no other
        weight = mx.swapaxes(weight, -1, -2)
        # Sorted float32 products are TF32 on CUDA, whatever MLX_ENABLE_TF32 says.
        ordered = ordered and wide.dtype != mx.float32
        product = mx.gather_mm(wide, weight, rhs_indices=experts, sorted_indices=ordered)
        return product.astype(x.dtype)

    def decode(self, planes: Planes) -> mx.array:
        return planes["weight"].astype(mx.float32)


@dataclass(frozen=True)
class Microscaled:
    """OCP MX blocks: 32 codes along the input share one E8M0 scale; the official values exactly."""

    mode: str
    bits: int
    group: int = 32

    def empty(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        *rows, width = shape
        return {
            "weight": mx.zeros((*rows, width * self.bits // 32), mx.uint32),
            "scales": mx.zeros((*rows, width // self.group), mx.uint8),
        }

    def matmul(self, planes: Planes, x: mx.array) -> mx.array:
        return mx.quantized_matmul(
            x,
            planes["weight"],
            planes["scales"],
            group_size=self.group,
            bits=self.bits,
            mode=self.mode,
        )

    def gather(self, planes: Planes, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        return mx.gather_qmm(
            x,
            planes["weight"],
            planes["scales"],
            rhs_indices=experts,
            group_size=self.group,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=ordered,
        )

    def decode(self, planes: Planes) -> mx.array:
        return mx.dequantize(
            planes["weight"],
            planes["scales"],
            group_size=self.group,
            bits=self.bits,
            mode=self.mode,
            dtype=mx.float32,
        )


def _widened_matmul(weight: mx.array, x: mx.array) -> mx.array:
    """x @ weight.T in float32 although a side is narrower, a block of rows at a time."""
    wide, parts = x.astype(mx.float32), []
    for start in range(0, weight.shape[0], WIDEN_ROWS):
        block = weight[start : start + WIDEN_ROWS]
        if parts:  # in turn, so that one widened block is alive at a time
            block = mx.depends([block], parts[-1:])[0]
        parts.append(wide @ block.astype(mx.float32).T)
    return mx.concatenate(parts, axis=-1).astype(x.dtype)


FORMATS: dict[str, Format] = {
    "f32": Dense(mx.float32),
    "bf16": Dense(mx.bfloat16),
    "mxfp8": Microscaled("mxfp8", bits=8),
    "mxfp4": Microscaled("mxfp4", bits=4),
}
