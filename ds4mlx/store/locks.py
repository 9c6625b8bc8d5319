"""Who may do what: one process writes at a time, any number read, and what is in use stays.

Readers take no lock: files never change, and one that is open can be read after its deletion. A
state that came from a chain, or was saved into one, holds a shared lock on the chain's last segment;
eviction leaves locked segments alone. The system drops locks when a process dies.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Wait for, then hold, the right to write; threads of one process count as several."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class Pin:
    """Keeps a segment from being evicted until it is closed; the file may be gone already."""

    def __init__(self, path: Path):
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY)
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        """Let it go."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def is_pinned(path: Path) -> bool:
    """Whether somebody has the file in use."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
