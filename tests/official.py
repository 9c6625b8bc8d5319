"""Official-format checkpoints taken apart and put together again, for the converter's tests."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import v4format

INDEX = "model.safetensors.index.json"
Tensor = tuple[str, np.ndarray]  # type tag and raw storage


def copy(source: Path, target: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(source, target))


def weight_map(path: Path) -> dict[str, str]:
    return json.loads((path / INDEX).read_text())["weight_map"]


def shard(path: Path, name: str) -> Path:
    """The file that holds a tensor."""
    return path / weight_map(path)[name]


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, raw."""
    found = {}
    for file in sorted(set(weight_map(path).values())):
        found.update(v4format.read_safetensors(path / file))
    return found


def write(path: Path, found: dict[str, Tensor]) -> None:
    """Write a shard."""
    v4format.write_safetensors(path, [(name, *tensor) for name, tensor in found.items()])


def change(path: Path, name: str, function: Callable[[Tensor], Tensor | None]) -> None:
    """Replace one tensor, or with None remove it, index included."""
    file = shard(path, name)
    found = v4format.read_safetensors(file)
    new = function(found.pop(name))
    if new is None:
        edit_index(path, lambda names: names.pop(name))
    else:
        found[name] = new
    write(file, found)


def add(path: Path, name: str, tensor: Tensor) -> None:
    """A tensor more, in the first shard."""
    file = min(set(weight_map(path).values()))
    found = v4format.read_safetensors(path / file)
    write(path / file, {**found, name: tensor})
    edit_index(path, lambda names: names.update({name: file}))


def edit_index(path: Path, function: Callable[[dict[str, str]], Any]) -> None:
    """Change the index's weight map in place."""
    index = json.loads((path / INDEX).read_text())
    function(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def edit_config(path: Path, **values) -> None:
    """Set keys of config.json; None removes one."""
    config = {**json.loads((path / "config.json").read_text()), **values}
    config = {key: value for key, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))


def unshard(path: Path) -> None:
    """Put everything in the one file that a small checkpoint may have."""
    everything = tensors(path)
    for file in path.glob("model*"):
        file.unlink()
    write(path / "model.safetensors", everything)


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file in a directory."""
    files = (p for p in sorted(path.iterdir()) if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
