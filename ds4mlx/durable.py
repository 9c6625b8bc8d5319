"""Files that are there whole or not at all, and last once that is said."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"  # behind the name of a file that is not whole yet


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


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[Path]:
    """Gives `temporary` to be written; what is there in the end becomes `path`, durably, in one step."""
    yield temporary
    with temporary.open("rb") as file:
        sync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    with replacing(path, path.with_name(path.name + PARTIAL)) as temporary:
        temporary.write_bytes(data)
