"""Waiting until what was written is on the medium."""

import contextlib
import fcntl
import os
from pathlib import Path


def sync(fd: int) -> None:
    """Wait until the file's bytes are on the medium; on macOS fsync alone does not."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, full)
            return
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the medium."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
