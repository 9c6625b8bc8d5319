"""An append-only file of JSON lines, each with a checksum; torn and damaged lines are skipped.

Several processes append at a time: a line is one write, and begins on a line of its own even
behind one that was cut off.
"""

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ds4mlx.durable import open_locked, sync, take_place, write_all
from ds4mlx.store.block_file import TEMPORARY, opened

MOST_BYTES = 1 << 27  # a larger one is not ours
HEAD = 256  # bytes by which a file is told from one that replaced it
APPENDING = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class Journal:
    """Reads what is new since the last reading, and appends."""

    def __init__(self, path: Path):
        self.path = path
        self._at = 0
        self._head = b""  # how the file began that was read up to `_at`

    def news(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole lines since the last call, and whether they replace what was read before."""
        try:
            with opened(self.path) as fd:
                size, head = os.fstat(fd).st_size, os.pread(fd, HEAD, 0)
                anew = size < self._at or not head.startswith(self._head) or not self._at
                self._at = 0 if anew else self._at
                raw = os.pread(fd, min(size - self._at, MOST_BYTES), self._at)
        except FileNotFoundError:
            return [], False
        whole = raw[: raw.rfind(b"\n") + 1]
        self._at += len(whole)
        self._head = head[: min(self._at, HEAD)]
        return [entry for line in whole.split(b"\n") if (entry := _parse(line))], anew

    def append(self, entries: Iterable[dict[str, Any]], durable: bool = False) -> None:
        """Add lines; wait for the disk if `durable`. Raises OSError."""
        data = b"".join(b"\n" + _line(entry) for entry in entries)
        fd = open_locked(self.path, APPENDING, 0o600, shared=True)  # not beside a `replacing`
        try:
            write_all(fd, data)
            if durable:
                sync(fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Have nobody append inside the block: read what is new there, then `replace`."""
        fd = open_locked(self.path, APPENDING, 0o600)
        try:
            yield
        finally:
            os.close(fd)

    def replace(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write it anew with these lines; only for who holds the right to write, inside `still`.

        The first line is a name that no other file has, by which readers tell the new one.
        """
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}{TEMPORARY}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            name = {"journal": secrets.token_hex(16)}
            write_all(fd, b"".join(map(_line, (name, *entries))))
            take_place(fd, temporary, self.path)
        finally:
            os.close(fd)


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    head, _, text = line.partition(b" ")
    if head != b"%08x" % zlib.crc32(text):
        return None
    entry = json.loads(text)
    return entry if isinstance(entry, dict) else None
