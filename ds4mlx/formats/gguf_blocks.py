"""Raw GGUF blocks as planes of the formats that hold them exactly."""

import numpy as np

from ds4mlx.formats import BLOCK_FORMATS, TAGS

MINUS_ZERO = 8  # as a code of FP4
PLAIN = {tag.lower(): TAGS[tag] for tag in ("F32", "F16", "BF16", "I32")}
BLOCK_BYTES = {
    **{name: tag.nbytes for name, tag in PLAIN.items()},
    "mxfp4": 17,
    **{name: found.block_bytes for name, found in BLOCK_FORMATS.items()},
}


def block_planes(raw: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Rows of raw GGUF data uint8 (..., bytes) as planes of the format that holds them exactly."""
    if name == "mxfp4":
        return mxfp4_planes(raw)
    if name in BLOCK_FORMATS:
        return BLOCK_FORMATS[name].from_blocks(raw)
    return {"weight": np.ascontiguousarray(raw).view(PLAIN[name].numpy)}


def mxfp4_planes(raw: np.ndarray) -> dict[str, np.ndarray]:
    """GGUF's MXFP4 blocks uint8 (..., 17 g) as MLX's planes: codes in natural order, and scales.

    A block is a scale, then 16 bytes with code j low and code j + 16 high.
    """
    blocks = raw.reshape(*raw.shape[:-1], -1, 17)
    codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
    codes[codes == MINUS_ZERO] = 0  # GGUF's codes are integers, which have no negative zero
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    weight = np.ascontiguousarray(pairs).reshape(*raw.shape[:-1], -1).view(np.uint32)
    return {"weight": weight, "scales": np.ascontiguousarray(blocks[..., 0])}
