"""OCP MX blocks: 32 codes along the input share one E8M0 scale; the official values exactly."""

import mlx.core as mx

from ds4mlx.formats.base import Format, Planes
from ds4mlx.formats.decoding import decoded_matmul, expert_by_expert

# From this many rows on a CPU decodes first: MLX's quantised products are slow there.
CPU_ROWS = 32


class Microscaled(Format):
    """MXFP8 (E4M3 codes) or MXFP4 (E2M1 codes), multiplied by MLX's own kernels, or on a CPU
    with many rows by decoding.

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
        if on_cpu() and x.size >= CPU_ROWS * x.shape[-1]:
            return decoded_matmul(self, planes, x)
        return mx.quantized_matmul(x, planes["weight"], planes["scales"], **self.options)

    def gather(self, planes: Planes, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        if on_cpu() and experts.size >= CPU_ROWS:
            return expert_by_expert(self, planes, x, experts)
        stack = planes["weight"], planes["scales"]
        return mx.gather_qmm(x, *stack, rhs_indices=experts, sorted_indices=ordered, **self.options)

    def decode(self, planes: Planes) -> mx.array:
        return mx.dequantize(planes["weight"], planes["scales"], dtype=mx.float32, **self.options)


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return mx.default_device() == mx.cpu
