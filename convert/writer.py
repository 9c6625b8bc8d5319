"""Writes one weight file, a chunk of rows at a time, so that it can stop and go on anywhere.

The file is `NAME.partial` until its last byte is on the disk. Every few seconds the journal notes how
far it is; going on re-reads what is there and compares its checksum before trusting it.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ds4mlx.convert.journal import Journal
from ds4mlx.convert.plan import OutFile, OutTensor
from ds4mlx.convert.planes import encode, row_chunks
from ds4mlx.convert.source import Source

PARTIAL = ".partial"
BLOCK = 8 << 20


class FileWriter:
    """One weight file in the making. `advance` is told of every byte that is in place."""

    def __init__(
        self,
        file: OutFile,
        source: Source,
        directory: Path,
        journal: Journal,
        chunk: int,
        seconds: float,
        advance: Callable[[int], Any],
    ):
        self.file, self.source, self.journal = file, source, journal
        self.chunk, self.seconds, self.advance = chunk, seconds, advance
        self.path = directory / file.name
        self.partial = directory / (file.name + PARTIAL)
        self.checksums: dict[str, str] = {}  # finished tensor -> sha256
        self.noted = time.monotonic()

    def write(self) -> None:
        """Write or finish the file and note it in the journal."""
        fd = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._resume_or_restart(fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        self.partial.replace(self.path)
        sync_directory(self.path.parent)
        header = hashlib.sha256(self.file.header).hexdigest()
        self.journal.append({"file": self.file.name, "header": header, "tensors": self.checksums})

    def _resume_or_restart(self, fd: int) -> None:
        record = self.journal.progress.get(self.file.name)
        if record is None or not self._matches(fd, record):
            record = {"tensors": {}, "bytes": 0}
            os.ftruncate(fd, 0)
            write_at(fd, self.file.header, 0)
        position = len(self.file.header)
        self.advance(position)
        for tensor in self.file.tensors:
            name = tensor.plane.name
            if name in record["tensors"]:
                self.checksums[name] = record["tensors"][name]
                self.advance(tensor.nbytes)
            else:
                self._write_tensor(fd, position, tensor, record["bytes"])
                record = {"tensors": {}, "bytes": 0}
            position += tensor.nbytes

    def _matches(self, fd: int, record: dict[str, Any]) -> bool:
        """Whether the bytes that a progress record vouches for are in the file."""
        position = len(self.file.header)
        if os.pread(fd, position, 0) != self.file.header:
            return False
        for tensor in self.file.tensors:
            name = tensor.plane.name
            wanted, nbytes = record["tensors"].get(name), tensor.nbytes
            if wanted is None:
                wanted, nbytes = record["sha256"], record["bytes"]
            if digest(fd, position, nbytes).hexdigest() != wanted:
                return False
            if name not in record["tensors"]:
                return True
            position += nbytes
        return True

    def _write_tensor(self, fd: int, position: int, tensor: OutTensor, skip: int) -> None:
        """Write a tensor at `position`; its first `skip` bytes are there."""
        running = digest(fd, position, skip)
        self.advance(skip)
        for end, rows in self._pieces(tensor, skip):
            write_at(fd, rows, position + end - len(rows))
            running.update(rows)
            self.advance(len(rows))
            if time.monotonic() - self.noted >= self.seconds:
                self._note(fd, end, running.hexdigest())
        self.checksums[tensor.plane.name] = running.hexdigest()

    def _pieces(self, tensor: OutTensor, skip: int) -> Iterator[tuple[int, bytes]]:
        """(where it ends in the tensor, bytes) of every chunk of rows beyond `skip` bytes."""
        end = 0
        for expert, rows in row_chunks(tensor.entry, self.chunk):
            end += (rows.stop - rows.start) * tensor.row_bytes
            start = end - (rows.stop - rows.start) * tensor.row_bytes
            if end > skip:
                late = max(0, skip - start) // tensor.row_bytes  # rows of it that are there
                rows = slice(rows.start + late, rows.stop)
                found = encode(
                    tensor.storage, tensor.plane.plane, self.source, tensor.entry, expert, rows
                )
                yield end, found.tobytes()

    def _note(self, fd: int, nbytes: int, checksum: str) -> None:
        os.fsync(fd)
        self.journal.append(
            {
                "file": self.file.name,
                "tensors": self.checksums,
                "bytes": nbytes,
                "sha256": checksum,
            }
        )
        self.noted = time.monotonic()


def write_at(fd: int, data: bytes, position: int) -> None:
    """Write all of `data` at `position`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, position)
        view, position = view[written:], position + written


def digest(fd: int, position: int, nbytes: int) -> "hashlib._Hash":
    """Running SHA-256 of bytes of a file."""
    running = hashlib.sha256()
    while nbytes:
        block = os.pread(fd, min(BLOCK, nbytes), position)
        if not block:
            break
        running.update(block)
        position, nbytes = position + len(block), nbytes - len(block)
    return running


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + PARTIAL)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)
