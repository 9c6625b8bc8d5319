"""The model's own roundings: FP8 on KV rows, Hadamard + FP4 on the indexer's queries and rows.

They stand in the forward pass that the weights were trained with, so they are on by default
(`rounding="official"`); `rounding="none"` leaves every value as computed.
"""

from typing import Literal

import mlx.core as mx

Rounding = Literal["official", "none"]

FP8_GROUP, FP8_MAX, FP8_FLOOR = 64, 448.0, 1e-4
FP4_GROUP, FP4_MAX, FP4_FLOOR = 32, 6.0, 6.0 * 2.0**-126


def power_of_two_at_least(x: mx.array) -> mx.array:
    """Smallest power of two that is >= x, for normal positive float32 x.

    Read off the float's bits: ceil(log2(x)) misrounds just above a power of two.
    """
    bits = x.view(mx.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(mx.uint32)
    return (exponent << 23).view(mx.float32)


def round_fp8(x: mx.array) -> mx.array:
    """E4M3 round trip of groups of 64 channels (a shorter last group if they do not divide).

    x: (..., n), any float type; the result has its shape and type. One power-of-two scale a group,
    values rounded to nearest, ties to even.
    """
    groups, width = _grouped(x, FP8_GROUP)
    largest = mx.maximum(mx.abs(groups).max(-1, keepdims=True), FP8_FLOOR)
    scale = power_of_two_at_least(largest / FP8_MAX)
    rounded = mx.from_fp8(mx.to_fp8(groups / scale), mx.float32) * scale
    return rounded.reshape(*x.shape[:-1], -1)[..., :width].astype(x.dtype)


def round_fp4(x: mx.array) -> mx.array:
    """E2M1 round trip of groups of 32 channels, one power-of-two scale a group.

    x: (..., n), any float type; the result has its shape and type.
    """
    groups, width = _grouped(x, FP4_GROUP)
    largest = mx.maximum(mx.abs(groups).max(-1, keepdims=True), FP4_FLOOR)
    scale = power_of_two_at_least(largest / FP4_MAX)
    rounded = nearest_e2m1(groups / scale) * scale
    return rounded.reshape(*x.shape[:-1], -1)[..., :width].astype(x.dtype)


def nearest_e2m1(x: mx.array) -> mx.array:
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with x's sign, for |x| <= 6; ties to the even code."""
    size = mx.abs(x)
    step = mx.where(size < 2, 0.5, mx.where(size < 4, 1.0, 2.0))
    return mx.sign(x) * mx.round(size / step) * step


def round_kv(rows: mx.array, rope_dims: int, rounding: Rounding) -> mx.array:
    """FP8-round the channels of KV rows (..., head_dim) that carry no position."""
    nope = rows.shape[-1] - rope_dims
    if rounding == "none" or nope == 0 or rows.size == 0:
        return rows
    return mx.concatenate([round_fp8(rows[..., :nope]), rows[..., nope:]], axis=-1)


def round_index(rows: mx.array, rounding: Rounding) -> mx.array:
    """Hadamard-rotate and FP4-round the indexer's queries or rows (..., index_head_dim).

    The rotation is orthonormal (Sylvester order), so without the rounding it would change no score.
    """
    if rounding == "none" or rows.size == 0:
        return rows
    return round_fp4(mx.hadamard_transform(rows))


def _grouped(x: mx.array, group: int) -> tuple[mx.array, int]:
    """x in float32 as (..., groups, group), zero-padded, and its width before padding."""
    width = x.shape[-1]
    x = x.astype(mx.float32)
    if width % group:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % group)])
    return x.reshape(*x.shape[:-1], -1, group), width
