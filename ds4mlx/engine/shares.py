"""Which tokens hold a share of the probability, exactly enough and on the device.

A float32 sum over a vocabulary is off in the sixth digit, and GPUs of Macs have no float64. So weights
are whole numbers: a token's distance below the most probable one, in halvings, in units of 2**-46,
and 2 to its negative, in units of 2**-45 or (beyond 131,071 tokens) a little more. Whole numbers add up
without loss and in any order. A weight is off by less than 2 units, mostly by half of one either way: a sum
over 129,280 tokens is off by less than 8e-9 of the largest weight, typically by 1e-10.
"""

import math

import mlx.core as mx
import numpy as np

ONE = 46  # bits after the point of a distance
_HALF = 26  # bits of the lower half of a factor
_FAR = 1024.0  # distances in nats (before a last factor in [0.5, 1)) end here
_STEP = 12  # bits of a table's index
# 2 ** -(i / 2 ** 12) and 2 ** -(i / 2 ** 24), in units of 2 ** -46.
_COARSE, _FINE = (
    np.rint(np.exp2(ONE - np.arange(1 << _STEP) / (1 << bits))).astype(np.int64)
    for bits in (_STEP, 2 * _STEP)
)
_REST = ONE - 2 * _STEP  # bits that the tables leave
_LN2 = round(math.log(2) * (1 << 30))


def halvings(logits: mx.array, largest: mx.array, coldness: float) -> mx.array:
    """How far logits times `coldness` lie below the largest, in units of 2**-46 halvings.

    logits: (..., n) float32; largest: (..., 1), their maxima, finite; coldness: from 1e-30 to 1e30.
    Gives int64 (..., n), at most about 2**57; what is further away, as -inf, is at the end.
    """
    factor, exponent = math.frexp(coldness)
    apart = largest - logits
    # What the subtraction rounded away, which is exact again.
    other = apart - largest
    lost = (largest - (apart - other)) - (logits + other)
    scale = 2.0**exponent
    near = apart * scale < _FAR
    # In units of 2 ** -46: a float32 of less than 2 ** 10 has at most that many bits, or is tiny.
    units = scale * 2.0**ONE
    distance = mx.where(near, apart, 0.0) * units
    whole = distance.astype(mx.int64) + (mx.where(near, lost, 0.0) * units).astype(mx.int64)
    whole = mx.where(near, mx.maximum(whole, 0), int(_FAR) << ONE)
    return _product(whole, round(factor / math.log(2) * (1 << ONE)))


def weights(halvings: mx.array, bits: int) -> mx.array:
    """2 to the negative of `halvings` (..., n), in units of 2**-bits, bits <= 45: int64 (..., n)."""
    part = halvings & ((1 << ONE) - 1)
    coarse = mx.array(_COARSE)[part >> (ONE - _STEP)]
    fine = mx.array(_FINE)[(part >> _REST) & ((1 << _STEP) - 1)]
    power = _product(coarse, fine)
    rest = ((part & ((1 << _REST) - 1)) * _LN2) >> 30
    power = power - (((power >> 20) * rest) >> (ONE - 20))
    shift = mx.minimum((halvings >> ONE) + (ONE - bits), 62)
    return ((power >> (shift - 1)) + 1) >> 1


def before_share(halvings: mx.array, share: float) -> mx.array:
    """Of tokens in falling order, those before which less than `share` of the whole lies.

    halvings: int64 (..., n), rising, n below 2**24; share: from 0 to 1, taken as reached where
    2**-50 of the whole is missing. bool (..., n).
    """
    limb = min(15, 32 - halvings.shape[-1].bit_length())
    weight = weights(halvings, 3 * limb)
    # Summed in three parts, each in 32 bits, of which every device has scans.
    sums, mask = _sums(weight >> (2 * limb)), (1 << limb) - 1
    for place in (limb, 0):
        sums = (sums << limb) + _sums((weight >> place) & mask)
    whole = sums[..., -1:]
    # whole * share, by halves of 31 and 26 bits, since it has more than 64.
    numerator = round(share * (1 << 52))
    high, low = numerator >> 26, numerator & ((1 << 26) - 1)
    above, below = whole >> 31, whole & ((1 << 31) - 1)
    wanted = ((above * high) << 5) + ((above * low) >> 21) + ((below * high) >> 26)
    return sums - weight < wanted - (whole >> 50)


def _sums(part: mx.array) -> mx.array:
    """Running sums of int64 (..., n) that stay below 2**32."""
    return mx.cumsum(part.astype(mx.uint32), axis=-1).astype(mx.int64)


def limit(ratio: float) -> int:
    """The halvings of a weight that is `ratio` times the largest; 0 has no limit."""
    return 1 << 62 if ratio < 2.0**-700 else math.floor(-math.log2(ratio) * (1 << ONE))


def _product(left: mx.array, right: mx.array | int) -> mx.array:
    """The product of numbers of at most 56 and 47 bits in units of 2**-46, rounded down."""
    high, low = left >> _HALF, left & ((1 << _HALF) - 1)
    other, rest = right >> _HALF, right & ((1 << _HALF) - 1)
    middle = (high * rest + low * other) >> (ONE - _HALF)
    return ((high * other) << (2 * _HALF - ONE)) + middle + ((low * rest) >> ONE)
