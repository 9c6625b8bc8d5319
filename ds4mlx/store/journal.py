"""An append-only file of JSON lines, each with a checksum; torn and damaged lines are skipped.

Several processes append at a time: a line is one write, and begins on a line of its own even
behind one that was cut off.
"""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ds4mlx.durable import sync
from ds4mlx.store.block_file import TEMPORARY, opened

MOST_BYTES = 1 << 27  # a larger one is not ours


class Journal:
    """Reads what is new since the last reading, and appends."""

    def __init__(self, path: Path):
        self.path = path
        self._at = 0
        self._inode = 0

    def news(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole lines since the last call, and whether they replace what was read before."""
        try:
            with opened(self.path) as fd:
                found = os.fstat(fd)
                anew = found.st_ino != self._inode or found.st_size < self._at
                if anew:
                    self._inode, self._at = found.st_ino, 0
                raw = os.pread(fd, min(found.st_size - self._at, MOST_BYTES), self._at)
        except FileNotFoundError:
            return [], False
        whole = raw[: raw.rfind(b"\n") + 1]
        self._at += len(whole)
        return [entry for line in whole.split(b"\n") if (entry := _parse(line))], anew

    def append(self, entries: Iterable[dict[str, Any]], durable: bool = False) -> None:
        """Add lines; wait for the disk if `durable`. Raises OSError."""
        data = b"".join(b"\n" + _line(entry) for entry in entries)
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            while data:
                data = data[os.write(fd, data) :]
            if durable:
                sync(fd)
        finally:
            os.close(fd)

    def replace(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write it anew with these lines; only for who holds the right to write."""
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}{TEMPORARY}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            data = b"".join(map(_line, entries))
            while data:
                data = data[os.write(fd, data) :]
            sync(fd)
        finally:
            os.close(fd)
        temporary.rename(self.path)


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    head, _, text = line.partition(b" ")
    if head != b"%08x" % zlib.crc32(text):
        return None
    entry = json.loads(text)
    return entry if isinstance(entry, dict) else None
