"""What `ds4mlx cache` does to a store's directory; needs no model."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds4mlx.errors import DataError
from ds4mlx.store import block_file, eviction, restoring
from ds4mlx.store.catalogue import Catalogue, Record, Segment, Use
from ds4mlx.store.locks import is_pinned, writing

FOLDERS = ("segments", "records", "damaged")
FILES = ("index.jsonl", "calls.jsonl", "lock")


def open_directory(directory: Path) -> Catalogue:
    """The catalogue of an existing store. Raises DataError."""
    if not (directory / "segments").is_dir() or not (directory / "records").is_dir():
        raise DataError(f"{directory}: not a KV store")
    catalogue = Catalogue(directory)
    catalogue.refresh()
    return catalogue


@dataclass(frozen=True)
class Entry:
    """A stored prefix, as `ls` shows it."""

    key: str  # SHA1 of the token ids
    tokens: int
    reason: str  # why it was saved; "boundary" if a save behind it left it
    nbytes: int  # of its own: the boundary record, and the last segment if it ends there
    hits: int
    decayed_hits: float
    created: float
    last_used: float
    model: str
    label: str
    in_use: bool
    complete: bool  # whether the chain of its rows is whole


def entries(catalogue: Catalogue, boundaries: bool = False) -> list[Entry]:
    """The stored prefixes, newest first; `boundaries`: also those that other saves left behind."""
    now = time.time()
    found = []
    for record in catalogue.records.values():
        if record.reason == "boundary" and not boundaries:
            continue
        segment = catalogue.segments.get(record.segment)
        use = catalogue.uses.get(record.key, Use())
        ends = segment is not None and segment.end == record.tokens
        found.append(
            Entry(
                record.prefix,
                record.tokens,
                record.reason,
                record.nbytes + (segment.nbytes if ends and segment else 0),
                use.total,
                round(use.decayed(now), 3),
                record.created,
                use.last or record.created,
                record.model[:12],
                segment.label if segment else "",
                segment is not None and is_pinned(catalogue.path(segment)),
                catalogue.chain(record.segment, record.tokens) is not None,
            )
        )
    return sorted(found, key=lambda entry: entry.created, reverse=True)


def totals(catalogue: Catalogue) -> dict[str, Any]:
    """Bytes, files and hits of the whole store."""
    return {
        "bytes": catalogue.nbytes,
        "segments": len(catalogue.segments),
        "records": len(catalogue.records),
        "tokens": sum(s.end - s.start for s in catalogue.segments.values()),
        "hits": sum(use.total for use in catalogue.uses.values()),
        "reasons": dict(Counter(record.reason for record in catalogue.records.values())),
    }


def find(catalogue: Catalogue, key: str) -> Record:
    """The newest record of the prefix whose public key begins with `key`. Raises DataError."""
    found = [record for record in catalogue.records.values() if record.prefix.startswith(key)]
    if not found:
        raise DataError(f"{catalogue.directory}: no stored prefix has a key that begins {key!r}")
    if len({record.prefix for record in found}) > 1:
        raise DataError(f"{catalogue.directory}: several stored prefixes have keys like {key!r}")
    return max(found, key=lambda record: record.created)


def details(catalogue: Catalogue, record: Record) -> dict[str, Any]:
    """A prefix: its record, the segments of its chain, and the text if it was kept."""
    chain = catalogue.chain(record.segment, record.tokens) or []
    texts = [restoring.read_text(catalogue, segment) for segment, _, _ in chain]
    return {
        "prefix": vars(record),
        "chain": [{**vars(segment), "used_to": end} for segment, _, end in chain],
        "boundaries": sorted({r.tokens for r in catalogue.on_chain(record.segment)}),
        "text": "".join(texts),
    }


def check(catalogue: Catalogue) -> list[str]:
    """Read every byte; one line for each file that is damaged or cannot be used."""
    faults = [f"{path}: damaged" for path in catalogue.damaged]
    faults += [f"{path}: set apart as damaged" for path in _files(catalogue, "damaged")]
    for item in [*catalogue.segments.values(), *catalogue.records.values()]:
        try:
            _check_file(catalogue.path(item), item)
        except (DataError, OSError) as error:
            faults.append(str(error))
    faults += [
        f"{catalogue.path(item)}: a part of its chain is missing" for item in _broken(catalogue)
    ]
    return faults


def prune(catalogue: Catalogue, budget: int | None, older_than: float | None) -> int:
    """Delete what is of no use, then leaves unused for `older_than` seconds, then to `budget`.

    Of no use: temporary files, damaged files, and what lacks a part of its chain. What is in use
    stays. Returns the bytes that came free.
    """
    with writing(catalogue.directory):
        catalogue.refresh()
        freed = _delete([*catalogue.leftovers(), *_files(catalogue, "damaged")])
        for item in _broken(catalogue):
            catalogue.remove(item)
            freed += item.nbytes
        if older_than is not None:
            freed += _drop_old(catalogue, time.time() - older_than)
        excess = 0 if budget is None else catalogue.nbytes - budget
        if excess > 0:
            freed += eviction.evict(catalogue, eviction.plan(catalogue, excess))
        catalogue.compact()
    return freed


def clear(directory: Path) -> int:
    """Delete everything that a store has written in its directory; the bytes that came free."""
    catalogue = open_directory(directory)
    with writing(directory):
        files = [path for folder in FOLDERS for path in _files(catalogue, folder)]
        freed = _delete([*files, *catalogue.leftovers()])
        for name in FILES[:-1]:
            (directory / name).unlink(missing_ok=True)
    return freed


def _files(catalogue: Catalogue, folder: str) -> list[Path]:
    path = catalogue.directory / folder
    return sorted(path.iterdir()) if path.is_dir() else []


def _delete(paths: list[Path]) -> int:
    freed = 0
    for path in paths:
        freed += path.stat().st_size
        path.unlink(missing_ok=True)
    return freed


def _check_file(path: Path, item: Segment | Record) -> None:
    with block_file.opened(path) as fd:
        block_file.check_blocks(fd, path, restoring.checked_header(fd, path, item))


def _broken(catalogue: Catalogue) -> list[Segment | Record]:
    """What lacks a part of its chain."""
    items: list[Segment | Record] = []
    items += [s for s in catalogue.segments.values() if catalogue.chain(s.key, s.end) is None]
    items += [r for r in catalogue.records.values() if catalogue.chain(r.segment, r.tokens) is None]
    return items


def _drop_old(catalogue: Catalogue, before: float) -> int:
    """Delete records last used before a time, and then the segments that no record needs."""
    freed = 0
    for record in list(catalogue.records.values()):
        last = max(record.created, catalogue.uses.get(record.key, Use()).last)
        segment = catalogue.segments.get(record.segment)
        if last < before and not (segment and is_pinned(catalogue.path(segment))):
            catalogue.remove(record)
            freed += record.nbytes
    needed: set[str] = set()
    for record in catalogue.records.values():
        needed |= {s.key for s, _, _ in catalogue.chain(record.segment, record.tokens) or []}
    for segment in list(catalogue.segments.values()):
        if segment.key not in needed and not is_pinned(catalogue.path(segment)):
            catalogue.remove(segment)
            freed += segment.nbytes
    return freed
