"""Files of steering: our own, which say what they do; ds4's; and llama.cpp's control vectors.

Our own are safetensors files: `direction.N`, float32 (D,), for every steered layer N from 0, and in the
metadata `kind`, `operation`, `site`, `scale` and `layers`, the numbers with commas between them. ds4's
are float32 (layers, D), nothing else, zeros where a layer is not steered; neither operation nor place
stands in them. Control vectors: see `control_vectors`.
"""

import os
from pathlib import Path

import numpy as np

from ds4mlx.config import ModelConfig
from ds4mlx.durable import put_in_place
from ds4mlx.errors import DataError
from ds4mlx.research import control_vectors
from ds4mlx.research.stated import Stated, Unstated
from ds4mlx.research.steering import Steering
from ds4mlx.weights.tensor_file import TensorFile, header

KIND = "ds4mlx steering 1"
# Where ds4 projects out.
RAW_SITES = ("ffn.out", "attn.out")


def load_steering(
    path: str | Path,
    config: ModelConfig,
    operation: str | None = None,
    site: str | None = None,
) -> Steering:
    """Read a file of any of the three kinds, for a model of this configuration.

    operation, site: what the file does, where it does not say so itself; files of ds4 never do, and
    those of llama.cpp seldom. Raises DataError naming the file: it is none, damaged, of another
    model, or says otherwise; and Unstated where it does not say, and nobody does.
    """
    path = Path(path)
    stated, directions = _read(path, config)
    stated = stated.agreed(path, operation, site)
    try:
        made = stated.steering(path, directions)
        made.check(config)
    except Unstated:
        raise
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return made


def save_steering(path: str | Path, steering: Steering, config: ModelConfig) -> None:
    """Write a file: .safetensors is our own, .gguf a control vector, .f32 what ds4 reads.

    In those for other programs directions that are projected out have a length of 1. Raises DataError
    for what such a file cannot say, and OSError.
    """
    path = Path(path)
    steering.check(config)
    writers = {".safetensors": _own, ".f32": _raw, ".gguf": control_vectors.write}
    if path.suffix not in writers:
        raise DataError(f"{path}: steering is written as {', '.join(writers)}")
    with put_in_place(path) as temporary:
        writers[path.suffix](temporary, steering, config)


def _read(path: Path, config: ModelConfig) -> tuple[Stated, dict[int, np.ndarray]]:
    """What a file says, and its directions that are not 0, by its first bytes."""
    try:
        with path.open("rb") as file:
            first, size = file.read(9), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if first.startswith(b"GGUF"):
        stated, directions = control_vectors.read(path)
    elif first[8:] == b"{" and int.from_bytes(first[:8], "little") < size:
        stated, directions = _read_own(path)
    else:
        stated, directions = Stated(), _read_raw(path, size, config)
    return stated, {n: each for n, each in directions.items() if each.any()}


def _read_own(path: Path) -> tuple[Stated, dict[int, np.ndarray]]:
    file = TensorFile(path)
    about, names = file.metadata, [f"direction.{n}" for n in _numbers(file.metadata)]
    if about.get("kind") != KIND:
        raise DataError(f"{path}: is no file of steering: its kind is {about.get('kind')!r}")
    if set(names) != set(file.tensors) or not names:
        raise DataError(f"{path}: its tensors are not those of its layers, {about.get('layers')!r}")
    stated = Stated(about.get("operation"), about.get("site"), about.get("scale"))
    return stated, {int(name.split(".")[1]): _floats(file, name) for name in names}


def _numbers(about: dict[str, str]) -> list[str]:
    numbers = about.get("layers", "").split(",")
    return [n for n in numbers if n.isascii() and n.isdigit()]


def _floats(file: TensorFile, name: str) -> np.ndarray:
    info = file.info(name)
    if info.dtype != "F32" or len(info.shape) != 1:
        raise DataError(
            f"{file.path}: {name} is {info.dtype} {list(info.shape)}, not F32 of one axis"
        )
    return np.frombuffer(file.read(name, 0, info.nbytes), "<f4")


def _read_raw(path: Path, size: int, config: ModelConfig) -> dict[int, np.ndarray]:
    layers, width = config.num_hidden_layers, config.hidden_size
    if size != 4 * layers * width:
        raise DataError(
            f"{path}: {size:,} bytes are no safetensors file, no GGUF file, and not {layers} x {width:,} "
            f"float32 ({4 * layers * width:,} bytes), as ds4's file for this model would be"
        )
    return dict(enumerate(np.fromfile(path, "<f4").reshape(layers, width)))


def _own(path: Path, steering: Steering, config: ModelConfig) -> None:
    tensors = {f"direction.{n}": ("F32", d.shape) for n, d in steering.directions.items()}
    about = {
        "kind": KIND,
        "operation": steering.operation,
        "site": steering.site,
        "scale": repr(float(steering.scale)),
        "layers": ",".join(map(str, steering.directions)),
    }
    values = [each.astype("<f4").tobytes() for each in steering.directions.values()]
    path.write_bytes(header(tensors, about) + b"".join(values))


def _raw(path: Path, steering: Steering, config: ModelConfig) -> None:
    if steering.operation != "project" or steering.site not in RAW_SITES:
        raise DataError(
            f"ds4 projects out at {' or '.join(RAW_SITES)}, so its file cannot be one to "
            f"{steering.operation} at {steering.site}"
        )
    rows = np.zeros((config.num_hidden_layers, config.hidden_size), "<f4")
    for layer, direction in steering.unit().items():
        rows[layer] = direction
    path.write_bytes(rows.tobytes())
