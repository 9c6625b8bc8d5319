"""GGUF files: checked byte by byte first, then read with the `gguf` package.

The package trusts what it reads (a huge count makes it loop for ever), so every count, length, type and
place is checked against the file's size before it sees the file. Data is read with ordinary reads.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from ds4mlx.errors import DataError

MAGIC = b"GGUF"
# Bytes of a scalar value type; strings and arrays have lengths of their own.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
LONGEST_HEADER = 1 << 30


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor: type name, shape (slowest axis first), and its bytes' place in the file."""

    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """One GGUF file. Raises DataError naming file, tensor or key, and cause."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                head = Checker(path, file, os.fstat(file.fileno()).st_size)
                head.check()
            self.header_digest = head.digest.hexdigest()
            reader = GGUFReader(path)
            self.fields = dict(reader.fields)
            self.tensors = {tensor.name: _described(tensor) for tensor in reader.tensors}
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - the package raises many kinds
            raise DataError(f"{path}: not a sound GGUF file: {error}") from None
        self._fd: int | None = None

    def value(self, key: str) -> Any:
        """A metadata value; None if there is none."""
        field = self.fields.get(key)
        return None if field is None else field.contents()

    def text(self, key: str) -> str | None:
        """A metadata value that must be text. Raises DataError if it is not."""
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{self.path}: {key} is not text")
        return value

    def tensor(self, name: str) -> GGUFTensor:
        """A tensor's description; DataError if there is none."""
        if name not in self.tensors:
            raise DataError(f"{self.path}: tensor {name} is missing")
        return self.tensors[name]

    def read(self, name: str, first: int, nbytes: int) -> np.ndarray:
        """`nbytes` bytes of a tensor from its byte `first` on, uint8."""
        start = self.tensor(name).start + first
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY)
        raw = os.pread(self._fd, nbytes, start)
        while len(raw) < nbytes:
            part = os.pread(self._fd, nbytes - len(raw), start + len(raw))
            if not part:
                raise DataError(f"{self.path}: file ends inside tensor {name}")
            raw += part
        return np.frombuffer(raw, np.uint8)

    def floats(self, name: str) -> np.ndarray:
        """A whole F32 tensor. Raises DataError if it has another type."""
        info = self.tensor(name)
        if info.type != "F32":
            raise DataError(f"{self.path}: tensor {name} has type {info.type}, expected F32")
        return self.read(name, 0, info.nbytes).view(np.float32).reshape(info.shape)


def _described(tensor: Any) -> GGUFTensor:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return GGUFTensor(tensor.tensor_type.name, shape, int(tensor.data_offset), int(tensor.n_bytes))


class Checker:
    """Walks over the header of a GGUF file and refuses whatever does not add up."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size, self.position = path, file, size, 0
        self.digest = hashlib.sha256()
        self.alignment = 32

    def check(self) -> None:
        """Raises DataError naming the cause."""
        if self.take(min(4, self.size)) != MAGIC:
            self.fail("not a GGUF file")
        version = self.number(4)
        if version != 3:
            self.fail(f"GGUF version {version} is not supported, only 3")
        tensors, keys = self.number(8), self.number(8)
        if tensors * 24 + keys * 13 > self.size:
            self.fail(f"counts of {tensors} tensors and {keys} keys exceed the file")
        for _ in range(keys):
            self.pair()
        self.tensor_infos(tensors)

    def fail(self, cause: str) -> None:
        raise DataError(f"{self.path}: {cause}")

    def take(self, count: int) -> bytes:
        """The next bytes; the file's size bounds them before they are read."""
        if count > min(self.size, LONGEST_HEADER) - self.position:
            self.fail("truncated inside its header")
        raw = self.file.read(count)
        if len(raw) < count:
            self.fail("truncated inside its header")
        self.position += count
        self.digest.update(raw)
        return raw

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def string(self, what: str) -> str:
        raw = self.take(self.number(8))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")
            raise

    def name(self, what: str) -> str:
        """A string that error messages will contain."""
        text = self.string(what)
        if not text.isprintable() or not text:
            self.fail(f"{what} is {text!r}")
        return text

    def pair(self) -> None:
        """A key and its value."""
        key = self.name("a key")
        kind = self.number(4)
        if kind == ARRAY:
            kind, count = self.number(4), self.number(8)
            if kind == STRING:
                if count * 8 > self.size:
                    self.fail(f"{key} has {count} strings, more than the file can hold")
                for _ in range(count):
                    self.string(key)
                return
            self.take(self.scalar(kind, key) * count)
        elif kind == STRING:
            self.string(key)
        else:
            value = self.take(self.scalar(kind, key))
            if key == "general.alignment":
                self.alignment = int.from_bytes(value, "little")

    def scalar(self, kind: int, key: str) -> int:
        if kind not in SCALARS:
            self.fail(f"{key} has unknown value type {kind}")
        return SCALARS[kind]

    def tensor_infos(self, count: int) -> None:
        """Names, shapes, types and places of all tensors."""
        places: list[tuple[int, int, str]] = []
        names: set[str] = set()
        for _ in range(count):
            name = self.name("a tensor name")
            if name in names:
                self.fail(f"tensor {name} occurs twice")
            names.add(name)
            nbytes = self.tensor_bytes(name)
            places.append((self.number(8), nbytes, name))
        if self.alignment < 1 or self.alignment & (self.alignment - 1) or self.alignment > 1 << 16:
            self.fail(f"general.alignment {self.alignment} is not a power of two below 65537")
        self.check_places(places)

    def tensor_bytes(self, name: str) -> int:
        axes = self.number(4)
        if not 1 <= axes <= 4:
            self.fail(f"tensor {name} has {axes} axes")
        shape = [self.number(8) for _ in range(axes)]
        kind = self.number(4)
        if kind not in GGMLQuantizationType.__members__.values():
            self.fail(f"tensor {name} has unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        weights = math.prod(shape)
        if not weights or shape[0] % block or weights // block * block_bytes > self.size:
            type_name = GGMLQuantizationType(kind).name
            self.fail(f"tensor {name} of shape {shape[::-1]} does not fit its type {type_name}")
        return weights // block * block_bytes

    def check_places(self, places: list[tuple[int, int, str]]) -> None:
        """Tensors lie apart, aligned, inside the file."""
        data = -(-self.position // self.alignment) * self.alignment
        end = 0
        for offset, nbytes, name in sorted(places):
            if offset % self.alignment:
                self.fail(f"tensor {name} is not aligned")
            if offset < end:
                self.fail(f"tensor {name} overlaps another")
            end = offset + nbytes
            if data + end > self.size:
                self.fail(f"truncated: tensor {name} ends at byte {data + end} of {self.size}")
