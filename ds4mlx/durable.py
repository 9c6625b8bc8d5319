"""Files that are there whole or not at all, and last once that is said."""

import contextlib
import errno
import fcntl
import os
import shutil
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


@contextlib.contextmanager
def put_in_place(path: Path) -> Iterator[Path]:
    """Gives an empty file to be written, which becomes `path` at the end of the block.

    If the block fails, what was at `path` stays as it was. A device or a pipe is given itself.
    Raises OSError naming `path`, at once, if it cannot be written.
    """
    if not _is_ordinary(path):
        yield path
        return
    target = path.resolve()
    temporary = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}")
    with _naming(path):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.write_bytes(b"")
    try:
        yield temporary
        with _naming(path):
            if target.exists():
                shutil.copymode(target, temporary)
            with replacing(target, temporary):
                pass
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises OSError naming `path` if `put_in_place` would; changes nothing."""
    with contextlib.suppress(_NotNow), put_in_place(path):
        raise _NotNow


class _NotNow(Exception):
    """Ends a block whose file is not wanted."""


def _is_ordinary(path: Path) -> bool:
    """Whether a path is, or would become, a file that can be replaced."""
    return path.parts[:2] not in (("/", "dev"), ("/", "proc")) and (
        path.is_file() or path.is_dir() or not path.exists()
    )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
