"""ds4mlx: DeepSeek-V4-Flash on MLX.

from ds4mlx import load, generate

model, tokenizer = load("DIR")
print(generate(model, tokenizer, "Hello"))

Names are imported when they are first used, so that a command can choose its BLAS before MLX is
loaded, and help costs no second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ds4mlx.blas import use_openblas

if TYPE_CHECKING:
    from ds4mlx.chat import encode_messages
    from ds4mlx.config import ModelConfig
    from ds4mlx.engine.generation import generate, stream_generate
    from ds4mlx.engine.load import load
    from ds4mlx.engine.sampling import Sampler
    from ds4mlx.errors import DataError
    from ds4mlx.model.model import Model
    from ds4mlx.state.decode_state import DecodeState, RewindError
    from ds4mlx.store import KVStore

__version__ = "0.1.0"

__all__ = [
    "DataError",
    "DecodeState",
    "KVStore",
    "Model",
    "ModelConfig",
    "RewindError",
    "Sampler",
    "encode_messages",
    "generate",
    "load",
    "stream_generate",
]

_ROOMS = {
    "DataError": "errors",
    "DecodeState": "state.decode_state",
    "KVStore": "store",
    "Model": "model.model",
    "ModelConfig": "config",
    "RewindError": "state.decode_state",
    "Sampler": "engine.sampling",
    "encode_messages": "chat",
    "generate": "engine.generation",
    "load": "engine.load",
    "stream_generate": "engine.generation",
}
_PACKAGES = ("chat", "convert", "custom_kernels", "research")

use_openblas()


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"ds4mlx.{name}")
    if name not in _ROOMS:
        raise AttributeError(f"module 'ds4mlx' has no attribute {name!r}")
    value = getattr(import_module(f"ds4mlx.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_PACKAGES})
