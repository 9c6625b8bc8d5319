"""Random weights in the formats, made where MLX computes; well scaled for their width."""

import math

import mlx.core as mx

from ds4mlx.formats import FORMATS

# Standard deviation of a weight of random codes, in units of the scale that multiplies them.
_DEVIATION = {
    "iq2_xxs": 58.0,
    "q2_k": 13.9,
    "q4_k": 258.0,
    "q8_0": 74.0,
    "mxfp4": 2.9,
    "mxfp8": 1.1,
}
# Of the pairs (d, dmin): the mean weight is zero with dmin so many times d.
_OFFSET = {"q2_k": 1.5, "q4_k": 7.5}


def random_words(shape: tuple[int, ...], seed: int) -> mx.array:
    """uint32 of every value, by hashing each element's place; the same on every device."""
    x = mx.arange(math.prod(shape), dtype=mx.uint32) * mx.array(0x9E3779B9, mx.uint32)
    x = x + mx.array(seed * 0x85EBCA6B & 0xFFFFFFFF, mx.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> shift)) * mx.array(factor, mx.uint32)
    return x.reshape(shape)


def random_planes(format: str, shape: tuple[int, ...], seed: int = 0) -> dict[str, mx.array]:
    """Planes of a weight (..., out, in) whose values have about the deviation 1 / sqrt(in).

    format: a float format, or one of those that the recipes and ds4's files use.
    """
    found, deviation = FORMATS[format], shape[-1] ** -0.5
    empty = found.empty(shape)
    if format not in _DEVIATION:
        weight = deviation * mx.random.normal(shape, key=mx.random.key(seed))
        return {"weight": weight.astype(empty["weight"].dtype)}
    unit = deviation / _DEVIATION[format]
    return {
        plane: _plane(format, plane, array, unit, seed + 7919 * i)
        for i, (plane, array) in enumerate(empty.items())
    }


def _plane(format: str, plane: str, empty: mx.array, unit: float, seed: int) -> mx.array:
    if empty.dtype == mx.float16:
        jitter = (random_words(empty.shape, seed) & 255).astype(mx.float32) / 256
        scale = unit * (0.75 + 0.5 * jitter)
        if format in _OFFSET:
            scale = scale * mx.where(mx.arange(empty.shape[-1]) % 2, _OFFSET[format], 1.0)
        return scale.astype(mx.float16)
    if format in ("mxfp4", "mxfp8") and plane == "scales":
        exponent = 127 + round(math.log2(unit))
        return (random_words(empty.shape, seed) % 2).astype(mx.uint8) + mx.array(exponent, mx.uint8)
    per = 4 // empty.dtype.size
    words = random_words((*empty.shape[:-1], -(-empty.shape[-1] // per)), seed)
    if format == "mxfp8":
        words = words & 0xBFBFBFBF  # without the largest codes, of which two are NaN
    return words.view(empty.dtype)[..., : empty.shape[-1]]
