"""safetensors files: a strict reader of headers and of ranges of bytes, and the header's bytes.

Files are read with ordinary reads, never mapped: a mapped page counts as resident memory, and a
truncated file must be an error instead of a signal.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds4mlx.errors import DataError
from ds4mlx.formats import TAGS

HEADER_LIMIT = 100 << 20
# What a file says of itself, unless told.
PLAIN = {"format": "mlx"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: type tag, shape, and its bytes' place counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """A safetensors file whose header has been checked. Raises DataError naming file and tensor."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.size, self.header = self.look()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        self.tensors, self.metadata = _parse(self.header[8:], path, self.size)
        self._fd: int | None = None

    def look(self) -> tuple[int, bytes]:
        """The file's size, and its first bytes up to the end of the header."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            return size, header_bytes(file.read, self.path, size)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor is; DataError if it is not in the file."""
        if name not in self.tensors:
            raise DataError(f"{self.path}: tensor {name} is missing")
        return self.tensors[name]

    def read(self, name: str, first: int, nbytes: int) -> bytes:
        """`nbytes` bytes of a tensor from its byte `first` on."""
        start = self.info(name).start + first
        try:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_RDONLY)
            parts: list[bytes] = []
            while nbytes:
                part = os.pread(self._fd, nbytes, start)
                if not part:
                    raise DataError(f"{self.path}: file ends inside tensor {name}")
                parts.append(part)
                start, nbytes = start + len(part), nbytes - len(part)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror} in tensor {name}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Give the file descriptor back; reading opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] = PLAIN
) -> bytes:
    """The first bytes of a file that holds tensors {name: (type tag, shape)} in this order."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + TAGS[dtype].nbytes * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def header_bytes(read: Callable[[int], bytes], path: Path, size: int) -> bytes:
    """The header with its length prefix; `read` gives the next bytes of the file."""
    prefix = read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(HEADER_LIMIT, size - 8):
        raise DataError(f"{path}: not a safetensors file, or truncated inside its header")
    return prefix + read(length)


def _parse(text: bytes, path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors, and what the metadata say in texts."""
    try:
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: header is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise DataError(f"{path}: header is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    base = 8 + len(text)
    tensors = {name: _entry(name, entry, path, base) for name, entry in entries.items()}
    position = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != position:
            raise DataError(f"{path}: tensor {name} overlaps another or leaves a gap before it")
        position += info.nbytes
    if position != size:
        what = "truncated" if position > size else "longer than its header says"
        raise DataError(f"{path}: file is {what} ({size} bytes for {position})")
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return tensors, {key: text for key, text in texts if isinstance(text, str)}


def _entry(name: str, entry: object, path: Path, base: int) -> TensorInfo:
    try:
        fields: Any = entry
        dtype, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise ValueError("a number is negative or none")
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: header entry of tensor {name} is malformed") from None
    if dtype not in TAGS:
        raise DataError(f"{path}: tensor {name} has unknown type {dtype!r}")
    wanted = TAGS[dtype].nbytes * math.prod(shape)
    if end - start != wanted:
        raise DataError(
            f"{path}: tensor {name} has {end - start} bytes for {dtype} {list(shape)} ({wanted})"
        )
    return TensorInfo(dtype, tuple(shape), base + start, wanted)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
