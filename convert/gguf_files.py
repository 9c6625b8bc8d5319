"""The files of one model in GGUF, read as one: a whole file, or all shards of a split one."""

import hashlib
import re
from pathlib import Path
from typing import Any

from ds4mlx.convert.gguf_container import GGUFFile, GGUFTensor
from ds4mlx.errors import DataError

SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GGUFFiles:
    """The file at `path`, or the split model it is a shard of. Raises DataError naming the file."""

    def __init__(self, path: Path):
        self.path = path
        self.parts = [GGUFFile(part) for part in shards(path)]
        self.files = _by_tensor(self.parts)

    def value(self, key: str) -> Any:
        """A metadata value of the first file; None if there is none."""
        return self.parts[0].value(key)

    def text(self, key: str) -> str | None:
        """A metadata value of the first file that must be text."""
        return self.parts[0].text(key)

    def holder(self, name: str) -> GGUFFile:
        """The file that has a tensor; DataError if none has."""
        if name not in self.files:
            raise DataError(f"{self.path}: tensor {name} is missing")
        return self.files[name]

    def tensor(self, name: str) -> GGUFTensor:
        """A tensor's description."""
        return self.holder(name).tensor(name)

    def digest(self) -> bytes:
        """Of every file's name, metadata and tensor headers."""
        found = hashlib.sha256()
        for part in self.parts:
            found.update(part.path.name.encode() + part.header_digest.encode())
        return found.digest()


def shards(path: Path) -> list[Path]:
    """All files of a split model, the first first; only `path` itself if it is not split."""
    found = SHARD.fullmatch(path.name)
    if not found:
        return [path]
    stem, count = found[1], int(found[3])
    if not 1 <= count <= 9999:
        raise DataError(f"{path}: the name tells of {count} files")
    parts = [path.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise DataError(f"{part}: missing, one of {count} files")
    return parts


def _by_tensor(parts: list[GGUFFile]) -> dict[str, GGUFFile]:
    """Tensor name -> its file."""
    files: dict[str, GGUFFile] = {}
    for part in parts:
        for name in part.tensors:
            if name in files:
                raise DataError(f"{part.path}: tensor {name} is also in {files[name].path.name}")
            files[name] = part
    total = parts[0].value("split.tensors.count")
    if len(parts) > 1 and total not in (None, len(files)):
        raise DataError(f"{parts[0].path}: {len(files)} tensors in all files, expected {total}")
    return files
