"""The one kind of file a KV store is made of: a header, then blocks of bytes; written once.

magic, bytes of the description, number of blocks | description (JSON) | bytes and checksum of every
block | checksum of all that | the blocks. Checksums are XXH3 of 128 bits. A file appears under its
name only when all of it is on the disk: temporary file, fsync, rename, and then `sync_directory`.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ds4mlx.durable import take_place
from ds4mlx.errors import DataError

FAMILY = b"DS4MLXK"  # and a digit, which is another one in another version
MAGIC = FAMILY + b"1"
DIGITS = {b"%d" % digit for digit in range(1, 10)}
FRONT = struct.Struct("<8sII")
ENTRY = struct.Struct("<Q16s")
CHECKSUM = 16
TEMPORARY = ".tmp"
FIRST_READ = 1 << 14
MOST_BLOCKS, MOST_META = 1 << 16, 1 << 20
VECTOR = 512  # buffers given to one system call

Buffer = memoryview | bytes


class DamagedFile(DataError):
    """A file is not what was written. `path` is the file."""

    def __init__(self, path: Path, cause: str):
        self.path = path
        super().__init__(f"{path}: {cause}")


class OtherVersion(DataError):
    """A file was written by another version of this program, which alone can tell if it is sound."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    meta: dict[str, Any]
    sizes: list[int]
    checksums: list[bytes]
    start: int  # offset of the first block

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.start + sum(self.sizes)


def checksum(block: Buffer) -> bytes:
    """The checksum of a block."""
    return xxhash.xxh3_128_digest(block)


def encode_header(meta: dict[str, Any], blocks: Sequence[Buffer]) -> bytes:
    """The bytes before the blocks."""
    text = json.dumps(meta, sort_keys=True).encode()
    entries = b"".join(ENTRY.pack(memoryview(b).nbytes, checksum(b)) for b in blocks)
    head = FRONT.pack(MAGIC, len(text), len(blocks)) + text + entries
    return head + checksum(head)


def write(path: Path, meta: dict[str, Any], blocks: Sequence[Buffer]) -> int:
    """Write a file whole and under its name, or not at all; its bytes.

    It lasts once `sync_directory` has returned. Raises OSError (a full disk, for one).
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    pieces = [encode_header(meta, blocks), *blocks]
    total = sum(memoryview(piece).nbytes for piece in pieces)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        try:
            _reserve(fd, total)
            _write_all(fd, pieces)
            take_place(fd, temporary, path)
        finally:
            os.close(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return total


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file open for reading. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def read_header(fd: int, path: Path) -> Header:
    """The header of an open file. Raises OtherVersion; DamagedFile, also for another size."""
    raw = os.pread(fd, FIRST_READ, 0)
    if raw[: len(FAMILY)] == FAMILY and raw[len(FAMILY) : len(MAGIC)] in DIGITS - {MAGIC[-1:]}:
        raise OtherVersion(f"{path}: was written by another version of ds4mlx")
    if len(raw) < FRONT.size or raw[: len(MAGIC)] != MAGIC:
        raise DamagedFile(path, "not a file of a KV store")
    _, meta_bytes, count = FRONT.unpack_from(raw)
    if meta_bytes > MOST_META or count > MOST_BLOCKS:
        raise DamagedFile(path, "its header is damaged")
    end = FRONT.size + meta_bytes + count * ENTRY.size
    if len(raw) < end + CHECKSUM:
        raw = os.pread(fd, end + CHECKSUM, 0)
    if checksum(raw[:end]) != raw[end : end + CHECKSUM]:
        raise DamagedFile(path, "its header is damaged")
    entries = list(ENTRY.iter_unpack(raw[FRONT.size + meta_bytes : end]))
    try:
        meta = json.loads(raw[FRONT.size : FRONT.size + meta_bytes])
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        raise OtherVersion(f"{path}: its header is sound, but describes nothing that is known here")
    header = Header(meta, [e[0] for e in entries], [e[1] for e in entries], end + CHECKSUM)
    actual = os.fstat(fd).st_size
    if actual != header.nbytes:
        raise DamagedFile(path, f"has {actual} bytes, expected {header.nbytes}")
    return header


def read_blocks(fd: int, path: Path, header: Header, into: Iterable[memoryview]) -> None:
    """Fill a buffer for each of the first blocks, one by one, and check them. Raises DamagedFile."""
    at = header.start
    for number, view in enumerate(into):
        if view.nbytes != header.sizes[number]:
            raise DamagedFile(path, f"block {number} has another size than the model's")
        done = 0
        while done < view.nbytes:
            got = os.preadv(fd, [view[done:]], at + done)
            if not got:
                raise DamagedFile(path, "ends too early")
            done += got
        at += done
        if checksum(view) != header.checksums[number]:
            raise DamagedFile(path, f"block {number} is damaged")


def _write_all(fd: int, pieces: Sequence[Buffer]) -> None:
    left = [view for view in (memoryview(piece) for piece in pieces) if view.nbytes]
    while left:
        left = _rest(left, os.writev(fd, left[:VECTOR]))


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of the buffers after `done` bytes."""
    for place, view in enumerate(views):
        if done < view.nbytes:
            return [view[done:], *views[place + 1 :]]
        done -= view.nbytes
    return []


def _reserve(fd: int, nbytes: int) -> None:
    """Have the blocks of the file set aside, so that a full disk is seen before writing."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)


def check_blocks(fd: int, path: Path, header: Header) -> None:
    """Read every block and check it. Raises DamagedFile."""
    read_blocks(fd, path, header, (memoryview(bytearray(size)) for size in header.sizes))
