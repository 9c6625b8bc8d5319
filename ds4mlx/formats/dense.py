"""Plain values of one type."""

import mlx.core as mx

from ds4mlx.formats.base import Format, Planes
from ds4mlx.formats.tags import DTYPES

# Rows of a half-precision matrix that are widened to float32 at a time: bounds the scratch memory.
WIDEN_ROWS = 16384


class Dense(Format):
    """One plane of float32, bfloat16 or float16 (or, for tables of ids, int32)."""

    def __init__(self, tag: str):
        self.name, self.dtype = tag.lower(), DTYPES[tag]
        self.layout = {"weight": (tag, 8 * self.dtype.size)}

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


def dense_format(dtype: mx.Dtype) -> str:
    """The name of the format that is one plane of this type."""
    return {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16"}[dtype]


def _widened_matmul(weight: mx.array, x: mx.array) -> mx.array:
    """x @ weight.T in float32 although a side is narrower, a block of rows at a time."""
    wide, parts = x.astype(mx.float32), []
    for start in range(0, weight.shape[0], WIDEN_ROWS):
        block = weight[start : start + WIDEN_ROWS]
        if parts:  # in turn, so that one widened block is alive at a time
            block = mx.depends([block], parts[-1:])[0]
        parts.append(wide @ block.astype(mx.float32).T)
    return mx.concatenate(parts, axis=-1).astype(x.dtype)
