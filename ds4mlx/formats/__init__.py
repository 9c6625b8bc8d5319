"""Storage formats by name."""

from ds4mlx.formats.base import Format, Planes
from ds4mlx.formats.blocks import BlockFormat
from ds4mlx.formats.dense import Dense
from ds4mlx.formats.iq import IQ2_XXS, IQ3_XXS
from ds4mlx.formats.k_quants import Q2_K, Q4_K, Q6_K
from ds4mlx.formats.microscaled import Microscaled
from ds4mlx.formats.q8_0 import Q8_0
from ds4mlx.formats.tags import DTYPES, TAGS

BLOCK_FORMATS: dict[str, BlockFormat] = {
    found.name: found for found in (Q8_0(), Q2_K(), Q4_K(), Q6_K(), IQ2_XXS(), IQ3_XXS())
}
FORMATS: dict[str, Format] = {
    **{found.name: found for found in map(Dense, ("F32", "F16", "BF16", "I32"))},
    "mxfp8": Microscaled("mxfp8", 8),
    "mxfp4": Microscaled("mxfp4", 4),
    **BLOCK_FORMATS,
}

__all__ = ["BLOCK_FORMATS", "DTYPES", "FORMATS", "TAGS", "BlockFormat", "Format", "Planes"]
