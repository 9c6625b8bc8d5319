"""Who may do what: one process writes at a time, any number read, and what is in use stays.

Readers take no lock: files never change, and one that is open can be read after its deletion. A
state that came from a chain, or was saved into one, holds a shared lock, a pin, on the chain's last
segment. Who deletes a segment holds a claim on it, an exclusive lock, from the moment at which it was
seen to be free until it is gone: a pin then waits and learns that the segment has gone. The system
drops locks when a process dies.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from ds4mlx.durable import Busy, lock, open_locked


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Wait for, then hold, the right to write; threads of one process count as several."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock(fd)
        yield
    finally:
        os.close(fd)


class Hold:
    """A lock on a segment, until it is closed."""

    def __init__(self, fd: int):
        self._fd: int | None = fd

    def close(self) -> None:
        """Let it go."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class Pin(Hold):
    """Keeps a segment from being deleted; any number may pin the same one."""

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """Pin a segment, after whoever has a claim on it; None if it has gone."""
        try:
            return cls(open_locked(path, os.O_RDONLY, shared=True))
        except FileNotFoundError:
            return None


class Claim(Hold):
    """Keeps others from pinning a segment that is to be deleted; needs the right to write."""

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """Claim a segment; None if somebody has it in use, or if it has gone."""
        try:
            return cls(open_locked(path, os.O_RDONLY, wait=False))
        except (Busy, FileNotFoundError):
            return None


def is_pinned(path: Path) -> bool:
    """Whether somebody has the file in use; may have changed when this returns."""
    claim = Claim.take(path)
    if claim is not None:
        claim.close()
    return claim is None and path.exists()
