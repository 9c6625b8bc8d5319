"""What `ds4mlx cache` does to a store's directory; needs no model."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ds4mlx.errors import DataError
from ds4mlx.store import block_file, eviction, restoring
from ds4mlx.store import directory as places
from ds4mlx.store.catalogue import Catalogue, Use
from ds4mlx.store.items import Record, Segment, fault
from ds4mlx.store.locks import Claim, is_pinned


def open_directory(directory: Path) -> Catalogue:
    """The catalogue of an existing store. Raises DataError."""
    places.check_store(directory)
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
    listed = []
    for record in catalogue.records.values():
        if record.reason == "boundary" and not boundaries:
            continue
        segment = catalogue.segments.get(record.segment)
        use = catalogue.uses.get(record.key, Use())
        ends = segment is not None and segment.end == record.tokens
        listed.append(
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
    return sorted(listed, key=lambda entry: entry.created, reverse=True)


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
    named = [record for record in catalogue.records.values() if record.prefix.startswith(key)]
    if not named:
        raise DataError(f"{catalogue.directory}: no stored prefix has a key that begins {key!r}")
    if len({record.prefix for record in named}) > 1:
        raise DataError(f"{catalogue.directory}: several stored prefixes have keys like {key!r}")
    return max(named, key=lambda record: record.created)


def details(catalogue: Catalogue, record: Record) -> dict[str, Any]:
    """A prefix: its record, the segments of its chain, and the text if it was kept."""
    links = catalogue.chain(record.segment, record.tokens) or []
    texts = [restoring.read_text(catalogue, segment) for segment, _, _ in links]
    return {
        "prefix": vars(record),
        "chain": [{**vars(segment), "used_to": end} for segment, _, end in links],
        "boundaries": sorted({r.tokens for r in catalogue.on_chain(record.segment)}),
        "text": "".join(texts),
    }


def check(catalogue: Catalogue) -> list[str]:
    """Read every byte; one line for each file that is damaged or cannot be used."""
    faults = [f"{path}: damaged" for path in catalogue.damaged]
    faults += [f"{path}: set apart as damaged" for path in _set_apart(catalogue)]
    faults += [str(error) for error in _unsound(catalogue).values()]
    faults += [
        f"{catalogue.path(item)}: a part of its chain is missing" for item in _broken(catalogue)
    ]
    return faults


def prune(catalogue: Catalogue, budget: int | None, older_than: float | None) -> int:
    """Delete what is of no use, then leaves unused for `older_than` seconds, then to `budget`.

    Of no use: temporary files, all that `check` finds damaged, which reads every byte, and what lacks
    a part of its chain. What is in use stays. Returns the bytes that came free.
    """
    suspects = [catalogue.path(item) for item in _unsound(catalogue)]
    with catalogue.writing():
        catalogue.refresh()
        damaged = [path for path in (*suspects, *catalogue.damaged) if fault(path) is not None]
        freed = _delete([*catalogue.leftovers(), *_set_apart(catalogue), *damaged])
        catalogue.damaged.clear()
        catalogue.refresh()
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


def clear(directory: Path) -> tuple[int, list[Path]]:
    """Delete everything that a store has written in its directory.

    Returns the bytes that came free, and the files of others, which stay. The directory is an empty
    store then. Raises DataError where it does not bear the mark of one.
    """
    places.check_store(directory)
    with Catalogue(directory).writing():
        keyed = [places.key_files(directory, folder).values() for folder in places.FOLDERS]
        notes = [directory / name for name in (places.INDEX, places.CALLS)]
        freed = _delete([*chain.from_iterable(keyed), *places.leftovers(directory), *notes])
    return freed, places.strangers(directory)


def _set_apart(catalogue: Catalogue) -> list[Path]:
    return list(places.key_files(catalogue.directory, places.DAMAGED).values())


def _delete(paths: Iterable[Path]) -> int:
    """Delete files, and links as such; the bytes that came free."""
    freed = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            freed += path.lstat().st_size
            path.unlink()
    return freed


def _unsound(catalogue: Catalogue) -> dict[Segment | Record, Exception]:
    """What cannot be read as it was written, and why; reads every byte."""
    errors: dict[Segment | Record, Exception] = {}
    for item in [*catalogue.segments.values(), *catalogue.records.values()]:
        path = catalogue.path(item)
        try:
            with block_file.opened(path) as fd:
                block_file.check_blocks(fd, path, block_file.read_header(fd, path))
        except FileNotFoundError:
            continue  # deleted meanwhile
        except (DataError, OSError) as error:
            errors[item] = error
    return errors


def _broken(catalogue: Catalogue) -> list[Segment | Record]:
    """What lacks a part of its chain."""
    items: list[Segment | Record] = []
    items += [s for s in catalogue.segments.values() if catalogue.chain(s.key, s.end) is None]
    items += [r for r in catalogue.records.values() if catalogue.chain(r.segment, r.tokens) is None]
    return items


def _drop_old(catalogue: Catalogue, before: float) -> int:
    """Delete records last used before a time, and then the segments that no record needs."""
    freed = 0
    with contextlib.ExitStack() as claims:  # until all is deleted
        free: set[str] = set()
        for segment in catalogue.segments.values():
            claim = Claim.take(catalogue.path(segment))
            if claim is not None:
                claims.callback(claim.close)
                free.add(segment.key)
        for record in list(catalogue.records.values()):
            last = max(record.created, catalogue.uses.get(record.key, Use()).last)
            if last < before and record.segment in free:
                catalogue.remove(record)
                freed += record.nbytes
        needed: set[str] = set()
        for record in catalogue.records.values():
            needed |= {s.key for s, _, _ in catalogue.chain(record.segment, record.tokens) or []}
        for segment in catalogue.segments.values():
            if segment.key not in free:
                used = catalogue.chain(segment.key, segment.end) or []
                needed |= {s.key for s, _, _ in used} | {segment.key}
        for segment in list(catalogue.segments.values()):
            if segment.key not in needed:
                catalogue.remove(segment)
                freed += segment.nbytes
    return freed
