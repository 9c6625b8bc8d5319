"""The directory of a KV store: its mark, its folders, and which names in it are the store's own.

Only what a store made is ever moved or deleted, and only in a directory that bears the mark. Any
other file, wherever it lies, is left alone.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ds4mlx.errors import DataError
from ds4mlx.store.block_file import FAMILY, TEMPORARY

MARK = ".ds4mlx-kv-store"
MARK_TEXT = (
    b"This directory is a KV store of ds4mlx. `ds4mlx cache --help` says what to do with it.\n"
)
SEGMENTS, RECORDS, DAMAGED = FOLDERS = ("segments", "records", "damaged")
INDEX, CALLS, LOCK = "index.jsonl", "calls.jsonl", "lock"
SUFFIX = ".kv"

KEY_FILE = re.compile(r"[0-9a-f]{40}\.kv")
PASSING = re.compile(rf"(?:[0-9a-f]{{40}}\.kv|{INDEX}|{CALLS})\.\d+{re.escape(TEMPORARY)}")


def make_store(root: Path) -> None:
    """Make a directory a KV store, private to the user. Raises OSError, and DataError.

    The mark comes first. Where a directory that does not bear it has files under the store's names
    which no store has written, it is refused.
    """
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: is not a directory")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    mark = root / MARK
    if not mark.exists():
        _check_names(root)
        mark.touch(mode=0o600)
        mark.write_bytes(MARK_TEXT)
    for name in FOLDERS:
        (root / name).mkdir(mode=0o700, exist_ok=True)


def check_store(root: Path) -> None:
    """DataError unless a directory bears the mark of a KV store."""
    if not root.exists():
        raise DataError(f"{root}: no such directory")
    if not (root / MARK).is_file():
        raise DataError(f"{root}: not a KV store, as it does not bear the mark {MARK}")


def key_files(root: Path, folder: str) -> dict[str, Path]:
    """The files of a folder whose names are those of segments or records, by their keys."""
    try:
        paths = sorted((root / folder).iterdir())
    except FileNotFoundError:
        return {}
    return {p.name.removesuffix(SUFFIX): p for p in paths if KEY_FILE.fullmatch(p.name)}


def leftovers(root: Path) -> list[Path]:
    """The store's temporary files; nobody writes them now if one has the right to write."""
    return [p for p in _files(root, (".", SEGMENTS, RECORDS)) if PASSING.fullmatch(p.name)]


def strangers(root: Path) -> list[Path]:
    """What lies in the directory and was not made by a store."""
    own = {root / name for name in (MARK, INDEX, CALLS, LOCK, *FOLDERS)} | set(leftovers(root))
    own |= {path for folder in FOLDERS for path in key_files(root, folder).values()}
    return [path for path in _files(root, (".", *FOLDERS)) if path not in own]


def _files(root: Path, folders: Iterable[str]) -> Iterator[Path]:
    for folder in folders:
        if (root / folder).is_dir():
            yield from sorted((root / folder).iterdir())


def _check_names(root: Path) -> None:
    """DataError if names of a store are taken by others' files."""
    taken = [path for folder in FOLDERS for path in _files(root, (folder,))]
    taken += [root / name for name in (*FOLDERS, INDEX, CALLS) if (root / name).is_file()]
    if taken and not any(_is_ours(path) for path in taken):
        raise DataError(
            f"{taken[0]}: is in the place of a KV store's files, but {root} is no KV store"
        )


def _is_ours(path: Path) -> bool:
    """Whether a store has written this file."""
    if not path.is_file() or not KEY_FILE.fullmatch(path.name):
        return False
    with path.open("rb") as file:
        return file.read(len(FAMILY)) == FAMILY
