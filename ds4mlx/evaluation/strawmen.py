"""Two ways of storing a model at 2 bits that a recipe might have been, made in memory.

Only the values are made, not files: each matrix is rounded to what its format would hold.
"""

import mlx.core as mx

from ds4mlx.evaluation.weights import replace_values
from ds4mlx.model.linear import ExpertStack, Matrix
from ds4mlx.model.model import Model

BITS, GROUP = 2, 64
# Two float16 numbers a group, a scale and an offset.
BITS_PER_WEIGHT = BITS + 2 * 16 / GROUP


def experts_affine(model: Model) -> set[str]:
    """MLX's affine 2 bits on the routed experts. Returns the modules rounded, by name."""
    return _round(model, experts=True)


def others_affine(model: Model) -> set[str]:
    """MLX's affine 2 bits on every matrix but the routed experts: attention, head and all."""
    return _round(model, experts=False)


def affine(values: mx.array) -> mx.array:
    """Values (..., n), n a multiple of 64, as MLX's affine 2 bits hold them; float32."""
    packed, scales, offsets = mx.quantize(values, GROUP, BITS)
    scales, offsets = (x.astype(mx.float16).astype(mx.float32) for x in (scales, offsets))
    return mx.dequantize(packed, scales, offsets, GROUP, BITS)


def _round(model: Model, experts: bool) -> set[str]:
    rounded = set()
    for name, module in model.named_modules():
        if isinstance(module, Matrix) and isinstance(module, ExpertStack) == experts:
            values = module.decode()
            if module.format != "i32" and values.shape[-1] % GROUP == 0:
                replace_values(module, affine(values))
                rounded.add(name)
    return rounded
