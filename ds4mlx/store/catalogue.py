"""What is in a store's directory: segments, boundary records, and how often they were of use.

The files are the truth. The index beside them saves reading their headers and keeps the hits; it is
made again from the files where it is lost. A file that was deleted and saved anew has the same name
and content, but another time and reason; until the index says so too, the older ones may be seen.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds4mlx.store import locks
from ds4mlx.store.block_file import DamagedFile, OtherVersion
from ds4mlx.store.directory import (
    DAMAGED,
    INDEX,
    RECORDS,
    SEGMENTS,
    SUFFIX,
    key_files,
    leftovers,
)
from ds4mlx.store.items import Record, Segment, exactly, fault, read_item
from ds4mlx.store.journal import Journal

HALF_LIFE = 6 * 3600.0  # seconds after which a hit counts half
LOG = logging.getLogger("ds4mlx")


@dataclass
class Use:
    """Hits, halved every 6 hours, as they were at `last`; `total` counts them all."""

    value: float = 0.0
    total: int = 0
    last: float = 0.0

    def hit(self, now: float) -> None:
        """Count one more."""
        self.value, self.total, self.last = self.decayed(now) + 1, self.total + 1, now

    def decayed(self, now: float) -> float:
        """The hits as they count now."""
        return self.value * 0.5 ** (max(0.0, now - self.last) / HALF_LIFE)


class Catalogue:
    """The segments and records of a directory by key. `refresh` brings it up to date."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.segments: dict[str, Segment] = {}
        self.records: dict[str, Record] = {}
        self.uses: dict[str, Use] = {}
        self.damaged: set[Path] = set()
        self.unknown: dict[Path, str] = {}  # sound as far as can be told, but not to be used; why
        self.corrected = 0  # times that the index was wrong about a file
        self._depth = 0  # of nested uses of the right to write
        self._journal = Journal(directory / INDEX)
        self._known: dict[str, dict[str, Any]] = {}  # key -> what the index says

    def path(self, item: Segment | Record) -> Path:
        """The file of a segment or record."""
        kind = SEGMENTS if isinstance(item, Segment) else RECORDS
        return self.directory / kind / (item.key + SUFFIX)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Have the right to write; may be nested, in one thread."""
        with contextlib.ExitStack() as stack:
            if not self._depth:
                stack.enter_context(locks.writing(self.directory))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def refresh(self) -> None:
        """Take in what other processes, or this one, have added and removed."""
        self._read_index()
        self._match(SEGMENTS, self.segments, Segment)
        self._match(RECORDS, self.records, Record)

    def add(self, *items: Segment | Record) -> None:
        """Note new files; best effort, as the index can be made again."""
        for item in items:
            (self.segments if isinstance(item, Segment) else self.records)[item.key] = item  # type: ignore[assignment]
        self._append([{"add": asdict(item)} for item in items])

    def hit(self, record: Record) -> None:
        """Count a use of a record."""
        self._append([{"hit": record.key, "t": time.time()}])

    def remove(self, item: Segment | Record) -> None:
        """Delete a file."""
        (self.segments if isinstance(item, Segment) else self.records).pop(item.key, None)
        self.path(item).unlink(missing_ok=True)

    def set_apart(self, path: Path, cause: Exception) -> None:
        """Move a damaged file out of the way, so that nothing is built upon it; warns once.

        A sound file that has taken its place meanwhile stays there.
        """
        if path not in self.damaged:
            LOG.warning("KV store: %s; it is set apart, and its tokens are prefilled anew", cause)
        self.damaged.add(path)
        self.segments.pop(path.stem, None)
        self.records.pop(path.stem, None)
        with contextlib.suppress(OSError), self.writing():
            if fault(path) is None:
                self.unknown[path] = str(cause)
            else:
                path.rename(self.directory / DAMAGED / path.name)
            self.damaged.discard(path)  # what may come there is another file

    def correct(self, item: Segment | Record) -> None:
        """Take a file's own word for what it is, as the index is wrong about it."""
        self.corrected += 1
        self._known.pop(item.key, None)
        items = self.segments if isinstance(item, Segment) else self.records
        items.pop(item.key, None)
        self._match(SEGMENTS if isinstance(item, Segment) else RECORDS, items, type(item))

    def compact(self) -> None:
        """Write the index anew if most of it is about what is gone; needs the right to write."""
        with contextlib.suppress(OSError):
            size = os.stat(self._journal.path).st_size  # noqa: PTH116
            if size > 4096 + 1200 * (len(self.segments) + len(self.records)):
                with self._journal.still():
                    self._read_index()
                    self._journal.replace(self._entries())

    def chain(self, segment: str, tokens: int) -> list[tuple[Segment, int, int]] | None:
        """Segments from the first to this one with the tokens each gives; None if one is missing."""
        links, key, end = [], segment, tokens
        while key:
            link = self.segments.get(key)
            if link is None or not link.start < end <= link.end:
                return None
            links.append((link, link.start, end))
            key, end = link.parent, link.start
        return links[::-1] if end == 0 else None

    def on_chain(self, segment: str) -> Iterator[Record]:
        """The records on the chain that ends with a segment."""
        chain = self.chain(segment, self.segments[segment].end) or []
        ends = {link.key: end for link, _, end in chain}
        for record in self.records.values():
            if record.tokens <= ends.get(record.segment, 0):
                yield record

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(i.nbytes for kind in (self.segments, self.records) for i in kind.values())

    def leftovers(self) -> list[Path]:
        """Temporary files; nobody writes them now if one has the right to write."""
        return leftovers(self.directory)

    def _read_index(self) -> None:
        news, anew = self._journal.news()
        if anew:
            self._known, self.uses = {}, {}
        for entry in news:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # another version's
                self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "add" in entry:
            self._known[entry["add"]["key"]] = entry["add"]
        elif "hit" in entry:
            self.uses.setdefault(entry["hit"], Use()).hit(float(entry["t"]))
        elif "use" in entry:
            value, total, last = float(entry["value"]), int(entry["total"]), float(entry["t"])
            self.uses[entry["use"]] = Use(value, total, last)

    def _entries(self) -> Iterator[dict[str, Any]]:
        for item in (*self.segments.values(), *self.records.values()):
            yield {"add": asdict(item)}
        for key, use in self.uses.items():
            if key in self.records:
                yield {"use": key, "value": use.value, "total": use.total, "t": use.last}

    def _append(self, entries: list[dict[str, Any]]) -> None:
        with contextlib.suppress(OSError):
            self._journal.append(entries)

    def _match(
        self, folder: str, items: dict[str, Any], kind: type[Segment] | type[Record]
    ) -> None:
        """Have `items` be what the folder has; a file's own header decides where the index fails."""
        files = key_files(self.directory, folder)
        for gone in items.keys() - files.keys():
            del items[gone]
        for key in files.keys() - items.keys():
            path = files[key]
            if path in self.damaged or path in self.unknown:
                continue
            try:
                items[key] = exactly(kind, self._known.get(key), key) or read_item(path, kind)
            except DamagedFile as error:
                self.set_apart(path, error)
            except OtherVersion as error:
                self.unknown[path] = str(error)
            except OSError:
                continue
