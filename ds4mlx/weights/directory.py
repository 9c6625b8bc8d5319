"""What a converted directory is: its files, its manifest, and the reading side of both.

A directory counts only with its manifest, which is written last. Every tensor stands in it with its
file, type, shape, format and checksum; the manifest has a checksum of itself.
"""

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.formats import FORMATS
from ds4mlx.weights.inventory import Entry, inventory
from ds4mlx.weights.tensor_file import TensorFile

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "convert-journal.jsonl"
CONFIG = "config.json"
GGUF_RECIPE = "keep"  # the one recipe of GGUF sources, and of no others


@dataclass(frozen=True)
class Plane:
    """One stored array of an entry."""

    name: str  # name of the tensor in the file
    plane: str  # its name in the format: "weight" is the first, or only, one
    dtype: str
    shape: tuple[int, ...]


def planes(entry: Entry, format: str) -> list[Plane]:
    """The arrays that hold an entry in a format."""
    *rows, columns = entry.shape
    arrays, layout = [], FORMATS[format].layout
    for plane, width in FORMATS[format].widths(columns).items():
        name = entry.name if plane == "weight" else f"{entry.module}.{plane}"
        arrays.append(Plane(name, plane, layout[plane][0], (*rows, width)))
    return arrays


def canonical(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest file, its own checksum last."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(content, indent=1, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**content, "checksum": checksum}, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished directory. Raises DataError if it is missing or damaged."""
    if not (path / MANIFEST).exists():
        raise DataError(f"{path}: {_what_else(path)}")
    raw = (path / MANIFEST).read_bytes()
    manifest = _parsed(raw)
    if manifest is None or canonical(manifest) != raw:
        raise DataError(f"{path / MANIFEST}: damaged: it does not match its own checksum")
    if manifest["format"] != FORMAT_VERSION:
        raise DataError(
            f"{path / MANIFEST}: format {manifest['format']} is not supported; convert again"
        )
    return manifest


def _what_else(path: Path) -> str:
    """What a path is that is no converted directory, and what to do about it."""
    make_one = f"make a model directory of it: ds4mlx convert {shlex.quote(str(path))} DIR"
    if path.is_file():
        kind = "a GGUF file" if path.suffix == ".gguf" else "a file"
        return f"is {kind}, not a converted model; {make_one}"
    if not path.is_dir():
        return "no such directory"
    if (path / JOURNAL).exists():
        return "its conversion is not finished: run the same `ds4mlx convert` again"
    if (path / CONFIG).exists() and any(path.glob("model*.safetensors")):
        return f"is an unconverted checkpoint; {make_one}"
    return f"no {MANIFEST}: not a converted model"


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


class ModelDirectory:
    """A finished directory whose files have the sizes, names, types and shapes that they must have."""

    def __init__(self, path: Path):
        self.path = path
        self.manifest = read_manifest(path)
        self.config = ModelConfig.from_file(path / CONFIG)
        self.inventory = inventory(self.config)
        self._check_sizes()
        self.files = [path / name for name in self.inventory]
        self._check_tensors()

    @classmethod
    def open(cls, path: str | Path) -> "ModelDirectory":
        """Raises DataError naming the file or tensor if the directory is not whole."""
        return cls(Path(path).expanduser())

    @property
    def recipe(self) -> str:
        """The recipe it was made with."""
        return self.manifest["recipe"]

    @property
    def formats(self) -> dict[str, str]:
        """Module path -> format of its weight."""
        entries = (entry for listed in self.inventory.values() for entry in listed)
        return {entry.module: self.format_of(entry) for entry in entries}

    def format_of(self, entry: Entry) -> str:
        """Format of an entry; DataError if the manifest does not list it."""
        listed = self.manifest["tensors"].get(entry.name)
        if listed is None:
            raise DataError(f"{self.path / MANIFEST}: tensor {entry.name} is missing")
        if listed["format"] not in FORMATS:
            raise DataError(
                f"{self.path / MANIFEST}: {entry.name} has unknown format {listed['format']}"
            )
        return listed["format"]

    def check_small_files(self) -> None:
        """DataError if a file that is not weights, such as the tokenizer, was changed."""
        for name, listed in self.manifest["files"].items():
            data = (self.path / name).read_bytes() if "sha256" in listed else None
            if data is not None and hashlib.sha256(data).hexdigest() != listed["sha256"]:
                raise DataError(
                    f"{self.path / name}: was changed after the conversion: it does not match its "
                    "checksum"
                )

    def _check_sizes(self) -> None:
        for name, listed in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise DataError(f"{file}: missing")
            if file.stat().st_size != listed["bytes"]:
                raise DataError(
                    f"{file}: has {file.stat().st_size} bytes, expected {listed['bytes']}"
                )

    def _check_tensors(self) -> None:
        for name, entries in self.inventory.items():
            if name not in self.manifest["files"]:
                raise DataError(f"{self.path / MANIFEST}: file {name} is missing")
            file = TensorFile(self.path / name)
            for entry in entries:
                for plane in planes(entry, self.format_of(entry)):
                    info = file.info(plane.name)
                    if (info.dtype, info.shape) != (plane.dtype, plane.shape):
                        raise DataError(
                            f"{file.path}: tensor {plane.name} is {info.dtype} {list(info.shape)}, "
                            f"expected {plane.dtype} {list(plane.shape)}"
                        )
