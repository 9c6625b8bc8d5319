"""The model's own roundings: FP8 on KV rows, Hadamard + FP4 on the indexer's queries and rows.

They stand in the forward pass that the weights were trained with, so they are on by default
(`rounding="official"`); `rounding="none"` leaves every value as computed.
"""

from collections.abc import Callable
from typing import Any, Literal

import mlx.core as mx

Rounding = Literal["official", "none"]

FP8_GROUP, FP8_MAX, FP8_FLOOR = 64, 448.0, 1e-4
FP4_GROUP, FP4_MAX, FP4_FLOOR = 32, 6.0, 6.0 * 2.0**-126


def straight_through(rounded: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """A rounding of x to its own shape and type whose gradient is that of leaving x as it is."""
    function: Any = mx.custom_function(rounded)
    function.vjp(lambda x, cotangent, _: cotangent)
    return function


def power_of_two_at_least(x: mx.array) -> mx.array:
    """Smallest power of two that is >= x, for normal positive float32 x.

    Read off the float's bits: ceil(log2(x)) misrounds just above a power of two.
    """
    bits = x.view(mx.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(mx.uint32)
    return (exponent << 23).view(mx.float32)


def encode_fp8(x: mx.array) -> tuple[mx.array, mx.array]:
    """E4M3 codes of x (..., n) and the E8M0 exponents of its groups of 64 (a shorter last group).

    One power-of-two scale a group, values rounded to nearest, ties to even. Both are uint8.
    """
    groups, width = _grouped(x, FP8_GROUP)
    scale = _scale(groups, FP8_MAX, FP8_FLOOR)
    codes = mx.to_fp8(groups / scale).reshape(*x.shape[:-1], -1)[..., :width]
    return codes, _exponents(scale)


def decode_fp8(codes: mx.array, exponents: mx.array) -> mx.array:
    """The float32 values of what `encode_fp8` gives."""
    groups, width = _grouped(mx.from_fp8(codes, mx.float32), FP8_GROUP)
    return (groups * _powers(exponents)).reshape(*codes.shape[:-1], -1)[..., :width]


def round_fp8(x: mx.array) -> mx.array:
    """E4M3 round trip of groups of 64 channels; x (..., n), the result has its shape and type."""
    return decode_fp8(*encode_fp8(x)).astype(x.dtype)


def encode_fp4(x: mx.array) -> tuple[mx.array, mx.array]:
    """E2M1 codes of x (..., n), two a byte, and the E8M0 exponents of its groups of 32; uint8.

    The lower half of a byte is the earlier channel, as in MLX's MXFP4. 32 must divide n.
    """
    groups, _ = _grouped(x, FP4_GROUP)
    scale = _scale(groups, FP4_MAX, FP4_FLOOR)
    rounded = nearest_e2m1(groups / scale)
    size = mx.abs(rounded)
    codes = mx.where(size < 2, 2 * size, mx.where(size < 4, size + 2, size / 2 + 4))
    codes = codes.astype(mx.uint8) | mx.where(groups < 0, 8, 0).astype(mx.uint8)
    codes = codes.reshape(*x.shape[:-1], -1, 2)
    return codes[..., 0] | (codes[..., 1] << 4), _exponents(scale)


def decode_fp4(codes: mx.array, exponents: mx.array) -> mx.array:
    """The float32 values of what `encode_fp4` gives, (..., n)."""
    codes = codes.astype(mx.uint16)
    halves = mx.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    # Sign, exponent and fraction put where a float16 has them give the value times 2**-14.
    values = (((halves & 8) << 12) | ((halves & 7) << 9)).view(mx.float16).astype(mx.float32)
    groups = values.reshape(*halves.shape[:-1], -1, FP4_GROUP)
    return (groups * 2.0**14 * _powers(exponents)).reshape(halves.shape)


def round_fp4(x: mx.array) -> mx.array:
    """E2M1 round trip of groups of 32 channels, one power-of-two scale a group.

    x: (..., n), any float type; the result has its shape and type.
    """
    groups, width = _grouped(x, FP4_GROUP)
    scale = _scale(groups, FP4_MAX, FP4_FLOOR)
    rounded = nearest_e2m1(groups / scale) * scale
    return rounded.reshape(*x.shape[:-1], -1)[..., :width].astype(x.dtype)


def nearest_e2m1(x: mx.array) -> mx.array:
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with x's sign, for |x| <= 6; ties to the even code."""
    size = mx.abs(x)
    step = mx.where(size < 2, 0.5, mx.where(size < 4, 1.0, 2.0))
    return mx.sign(x) * mx.round(size / step) * step


def spread_index(rows: mx.array, rounding: Rounding) -> mx.array:
    """Hadamard-rotate the indexer's queries or rows (..., index_head_dim) before their rounding.

    The rotation is orthonormal (Sylvester order), so without the rounding it would change no score.
    """
    return rows if rounding == "none" or rows.size == 0 else mx.hadamard_transform(rows)


def round_index(rows: mx.array, rounding: Rounding) -> mx.array:
    """Hadamard-rotate and FP4-round the indexer's queries or rows (..., index_head_dim)."""
    rows = spread_index(rows, rounding)
    return rows if rounding == "none" or rows.size == 0 else straight_through(round_fp4)(rows)


def _scale(groups: mx.array, largest_code: float, floor: float) -> mx.array:
    """The power of two, (..., groups, 1), by which each group (..., groups, n) is divided."""
    largest = mx.maximum(mx.abs(groups).max(-1, keepdims=True), floor)
    return power_of_two_at_least(largest / largest_code)


def _exponents(scale: mx.array) -> mx.array:
    """E8M0 bytes (..., groups) of powers of two (..., groups, 1)."""
    return (scale[..., 0].view(mx.uint32) >> 23).astype(mx.uint8)


def _powers(exponents: mx.array) -> mx.array:
    """The powers of two (..., groups, 1) of E8M0 bytes (..., groups)."""
    return (exponents.astype(mx.uint32) << 23).view(mx.float32)[..., None]


def _grouped(x: mx.array, group: int) -> tuple[mx.array, int]:
    """x in float32 as (..., groups, group), zero-padded, and its width before padding."""
    width = x.shape[-1]
    x = x.astype(mx.float32)
    if width % group:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % group)])
    return x.reshape(*x.shape[:-1], -1, group), width
