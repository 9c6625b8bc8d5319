"""OCP MX blocks: 32 codes along the input share one E8M0 scale; the official values exactly."""

import mlx.core as mx

from ds4mlx.formats.base import Format, Planes


class Microscaled(Format):
    """MXFP8 (E4M3 codes) or MXFP4 (E2M1 codes), multiplied by MLX's own kernels.

    Planes: `weight` uint32, codes packed from the low bits up; `scales` uint8 (..., in / 32).
    """

    block = 32

    def __init__(self, name: str, code_bits: int):
        self.name, self.code_bits = name, code_bits
        self.layout = {"weight": ("U32", code_bits), "scales": ("U8", 0.25)}

    @property
    def options(self) -> dict:
        """What MLX's quantised functions are told."""
        return {"group_size": self.block, "bits": self.code_bits, "mode": self.name}

    def matmul(self, planes: Planes, x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, planes["weight"], planes["scales"], **self.options)

    def gather(self, planes: Planes, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        stack = planes["weight"], planes["scales"]
        return mx.gather_qmm(x, *stack, rhs_indices=experts, sorted_indices=ordered, **self.options)

    def decode(self, planes: Planes) -> mx.array:
        return mx.dequantize(planes["weight"], planes["scales"], dtype=mx.float32, **self.options)
