"""Files that are there whole or not at all, that last once this is said, and that one process has.

Every file that must not be seen half written is written aside, under another name in its own
directory, and then put in place in one step. Every lock is an advisory lock (flock) on a file, which
the system drops when its process ends, however that happens.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"  # behind the name of a file that is not whole yet


class Busy(Exception):
    """Another process, or another descriptor of this one, has the lock."""


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


def take_place(fd: int, temporary: Path, path: Path) -> None:
    """Have the open file `temporary` become `path` in one step, its bytes being on the medium.

    The name lasts once `sync_directory` has returned.
    """
    sync(fd)
    os.replace(temporary, path)  # noqa: PTH105 - as a system call, which tests count


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[Path]:
    """Gives `temporary` to be written; what is there in the end becomes `path`, durably, in one step."""
    yield temporary
    with temporary.open("rb") as file:
        take_place(file.fileno(), temporary, path)
    sync_directory(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    with replacing(path, path.with_name(path.name + PARTIAL)) as temporary:
        temporary.write_bytes(data)


def write_all(fd: int, data: bytes) -> None:
    """Write every byte, however many calls that takes. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


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


# Locks


def lock(fd: int, *, shared: bool = False, wait: bool = True) -> None:
    """Lock an open file until it is closed. Raises Busy where `wait` is False and another has it."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(fd, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy from None


def open_locked(
    path: Path, flags: int, mode: int = 0o666, *, shared: bool = False, wait: bool = True
) -> int:
    """Open and lock a file that others may delete or replace; the descriptor holds the lock.

    The lock is one on the file that `path` names: where that has changed between opening and
    locking, the new file is opened. Raises Busy as `lock` does, and OSError.
    """
    while True:
        fd = os.open(path, flags, mode)
        try:
            lock(fd, shared=shared, wait=wait)
            if names(path, fd):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def names(path: Path, fd: int) -> bool:
    """Whether `path` is still the name of an open file."""
    try:
        there, ours = path.stat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


@contextlib.contextmanager
def alone(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Have a lock on a file that is made for it and deleted at the end. Raises Busy, OSError."""
    fd = open_locked(path, os.O_RDWR | os.O_CREAT, wait=wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: nobody else can have it
        os.close(fd)
