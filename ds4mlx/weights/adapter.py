"""What an adapter's directory holds, in mlx-lm's form: `adapters.safetensors` and `adapter_config.json`.

For each adapted matrix, by its name in the module tree, there are lora_a (in, rank) and lora_b
(rank, out). Names and shapes are checked before any value is read.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ds4mlx.errors import DataError
from ds4mlx.weights.tensor_file import TensorFile

ADAPTERS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PARTS = ("lora_a", "lora_b")
FLOATS = ("F32", "F16", "BF16")


class Pair(NamedTuple):
    """What is learnt beside one matrix: lora_a (in, rank) and lora_b (rank, out)."""

    lora_a: mx.array
    lora_b: mx.array


@dataclass(frozen=True)
class Adapter:
    """Pairs by the names of their matrices, what they are multiplied by, and the rate of dropout."""

    path: Path
    rank: int
    scale: float
    dropout: float
    pairs: dict[str, Pair]

    def added(self, name: str, rows: slice) -> mx.array:
        """What it adds to rows of a matrix, of a stack to each expert's: float32 (rows, in)."""
        a, b = (part.astype(mx.float32) for part in self.pairs[name])
        return self.scale * (b[:, rows].T @ a.T)


def read_adapter(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """The adapter in a directory; `shapes`: of the matrices that the model can have adapted, by name.

    Raises DataError naming the file, and the tensor if there is one, with the cause: what is missing,
    truncated or no such file, made for another model, or not finite.
    """
    folder = Path(path).expanduser()
    rank, scale, dropout = _parameters(folder / ADAPTER_CONFIG)
    file = TensorFile(folder / ADAPTERS)
    names = _matrices(file)
    for name in names:
        _check_fits(file, name, rank, shapes.get(name))
    arrays: Any = mx.load(str(file.path))
    for name, array in arrays.items():
        if not mx.isfinite(array).all().item():
            raise DataError(f"{file.path}: tensor {name} holds a value that is not finite")
    pairs = {name: Pair(*(arrays[f"{name}.{part}"] for part in PARTS)) for name in names}
    return Adapter(folder, rank, scale, dropout, pairs)


def adapter_config(adapter: Adapter, layers: int) -> bytes:
    """The bytes of a configuration file; layers: how many the model has."""
    parameters = {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout}
    keys = sorted(adapter.pairs)
    content = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {**parameters, "keys": keys},
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _parameters(path: Path) -> tuple[int, float, float]:
    """Rank, scale and dropout of a configuration file."""
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such directory")
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not valid JSON") from None
    kind = content.get("fine_tune_type", "lora") if isinstance(content, dict) else None
    if kind != "lora":
        raise DataError(f"{path}: fine_tune_type is {kind!r}, and only lora is supported")
    values = content.get("lora_parameters")
    given: dict[str, Any] = {"dropout": 0.0} | (values if isinstance(values, dict) else {})
    rank, scale, dropout = (_number(given.get(key)) for key in ("rank", "scale", "dropout"))
    if not rank >= 1 or rank % 1:
        raise DataError(f"{path}: lora_parameters.rank must be a whole number from 1 on")
    if math.isnan(scale) or not 0 <= dropout < 1:
        raise DataError(f"{path}: lora_parameters has no usable scale or dropout")
    return int(rank), scale, dropout


def _number(value: Any) -> float:
    """A finite number; NaN for anything else."""
    usable = type(value) in (int, float) and math.isfinite(value)
    return float(value) if usable else math.nan


def _matrices(file: TensorFile) -> list[str]:
    """The names of the matrices that a file has pairs for."""
    names: dict[str, None] = {}
    for tensor in file.tensors:
        name, _, part = tensor.rpartition(".")
        if part not in PARTS:
            raise DataError(f"{file.path}: tensor {tensor} is no part of an adapter")
        names[name] = None
    if not names:
        raise DataError(f"{file.path}: holds no adapter")
    return list(names)


def _check_fits(file: TensorFile, name: str, rank: int, shape: tuple[int, ...] | None) -> None:
    """Raises DataError unless a pair belongs to a matrix of this shape, None if there is none."""
    if shape is None:
        raise DataError(
            f"{file.path}: the model has no matrix {name} that can be adapted: it is an adapter of "
            "another model"
        )
    *_, rows, columns = shape
    for part, wanted in zip(PARTS, ((columns, rank), (rank, rows)), strict=True):
        info = file.info(f"{name}.{part}")
        if info.dtype not in FLOATS:
            raise DataError(f"{file.path}: tensor {name}.{part} is {info.dtype}, not a float")
        if info.shape != wanted:
            raise DataError(
                f"{file.path}: tensor {name}.{part} is {list(info.shape)}, but for this model's matrix "
                f"{[*shape]} and rank {rank} it must be {list(wanted)}"
            )
