"""Rotary position embedding: interleaved pairs of the last channels, two frequency tables.

Frequencies, and angles as position x frequency, are formed in float32 as the official code forms
them; sines and cosines are then taken on the host with full range reduction, because a GPU's fast
trigonometry is wrong at long contexts.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.layer.plain import Angles

# Positions for which what steps are told is made at once, each of which is about to be needed.
AT_ONCE = 32


class Rotary:
    """The angles of one kind of layer; layers of a kind share one object.

    Layers without a compressor use `rope_theta` as it is; layers with one use
    `compress_rope_theta` with YaRN for everything in the layer. YaRN's magnitude factor is not used.
    """

    def __init__(self, config: ModelConfig, compressed: bool):
        self.frequencies = frequencies(config, compressed)

    def angles(self, positions: np.ndarray) -> Angles:
        """cos and sin, each float32 (L, rope_dims / 2), of positions int (L,)."""
        cos, sin = turns(np.multiply.outer(positions.astype(np.float32), self.frequencies))
        return mx.array(cos), mx.array(sin)


def turns(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32, of angles float32."""
    angle = angle.astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def step_angles(tables: dict[int, Rotary], positions: Sequence[int]) -> mx.array:
    """What a step of one token of each of B sequences needs, float32 (B, 4, 2, rope_dims / 2), cos and sin.

    The angles at its position in layers that do not compress, and in those that do; and in the latter
    at the first token of the rows of ratio 4 and of ratio 128 to which it belongs.
    """
    kinds = tuple(tables[ratio] for ratio in (0, 4, 4, 128))
    if len(positions) > 1:
        return mx.array(
            np.array([_next_angles(kinds, p // AT_ONCE)[p % AT_ONCE] for p in positions])
        )
    number, own = divmod(positions[0], AT_ONCE)
    return _held_angles(kinds, number)[own : own + 1]


@lru_cache(maxsize=64)
def _held_angles(kinds: tuple[Rotary, ...], number: int) -> mx.array:
    """`_next_angles` where kernels read them: a GPU waits for what the host has just written."""
    return mx.array(_next_angles(kinds, number))


@lru_cache(maxsize=64)
def _next_angles(kinds: tuple[Rotary, ...], number: int) -> np.ndarray:
    """`step_angles` of AT_ONCE positions, the `number`-th so many of all."""
    position = np.arange(number * AT_ONCE, (number + 1) * AT_ONCE)
    places = np.stack([position, position, position // 4 * 4, position // 128 * 128], 1)
    frequencies = np.stack([table.frequencies for table in kinds])
    return np.stack(turns(places.astype(np.float32)[..., None] * frequencies), 2)


def rotary_tables(config: ModelConfig) -> dict[int, Rotary]:
    """The table of the layers of each compression ratio; those that compress share one."""
    compressed = Rotary(config, compressed=True)
    return {0: Rotary(config, compressed=False), 4: compressed, 128: compressed}


def frequencies(config: ModelConfig, compressed: bool) -> np.ndarray:
    """Radians per token of each channel pair, float32 (qk_rope_head_dim / 2,)."""
    dims = config.qk_rope_head_dim
    base = config.compress_rope_theta if compressed else config.rope_theta
    exponents = (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)).astype(np.float64)
    plain = np.float32(1) / np.power(base, exponents).astype(np.float32)
    yarn = config.rope_scaling
    if not compressed or yarn.original_max_position_embeddings == 0:
        return plain
    low = max(math.floor(_pair_turning(config, base, yarn.beta_fast)), 0)
    high = min(math.ceil(_pair_turning(config, base, yarn.beta_slow)), dims - 1)
    span = np.float32(high - low if high != low else 0.001)
    ramp = np.clip((np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / span, 0, 1)
    smooth = np.float32(1) - ramp
    return plain / np.float32(yarn.factor) * (1 - smooth) + plain * smooth


def _pair_turning(config: ModelConfig, base: float, turns: float) -> float:
    """The (fractional) pair that makes `turns` full turns over YaRN's original context."""
    length = config.rope_scaling.original_max_position_embeddings
    wavelength = length / (turns * 2 * math.pi)
    return config.qk_rope_head_dim * math.log(wavelength) / (2 * math.log(base))
