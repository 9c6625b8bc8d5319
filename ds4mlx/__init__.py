"""ds4mlx: DeepSeek-V4-Flash on MLX.

from ds4mlx import load, generate

model, tokenizer = load("DIR")
print(generate(model, tokenizer, "Hello"))
"""

import os

# The float32 parts of the model (router, hyper-connections, softmax) are float32 on purpose;
# MLX's CUDA back-end would otherwise run their products in TF32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

__version__ = "0.1.0"

from ds4mlx.blas import choose_blas

FAST_BLAS = choose_blas()

from ds4mlx.config import ModelConfig
from ds4mlx.engine.generation import generate, stream_generate
from ds4mlx.engine.load import load
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState, RewindError
from ds4mlx.store import KVStore

__all__ = [
    "DataError",
    "DecodeState",
    "KVStore",
    "Model",
    "ModelConfig",
    "RewindError",
    "generate",
    "load",
    "stream_generate",
]
