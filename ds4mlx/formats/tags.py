"""Types of numbers by the tags that safetensors files give them: bytes, and how NumPy and MLX have them."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Tag(NamedTuple):
    """Bytes of an element; NumPy's type, bit patterns where it has none; MLX's, None where it has none."""

    nbytes: int
    numpy: type[np.generic]
    mlx: mx.Dtype | None = None


TAGS = {
    "F64": Tag(8, np.float64),
    "F32": Tag(4, np.float32, mx.float32),
    "F16": Tag(2, np.float16, mx.float16),
    "BF16": Tag(2, np.uint16, mx.bfloat16),
    "F8_E4M3": Tag(1, np.uint8),
    "F8_E5M2": Tag(1, np.uint8),
    "F8_E8M0": Tag(1, np.uint8),
    "I64": Tag(8, np.int64, mx.int64),
    "I32": Tag(4, np.int32, mx.int32),
    "I16": Tag(2, np.int16, mx.int16),
    "I8": Tag(1, np.int8, mx.int8),
    "U64": Tag(8, np.uint64, mx.uint64),
    "U32": Tag(4, np.uint32, mx.uint32),
    "U16": Tag(2, np.uint16, mx.uint16),
    "U8": Tag(1, np.uint8, mx.uint8),
    "BOOL": Tag(1, np.bool_, mx.bool_),
}
# Those that MLX computes with, which the planes of a format consist of.
DTYPES = {tag: found.mlx for tag, found in TAGS.items() if found.mlx is not None}
