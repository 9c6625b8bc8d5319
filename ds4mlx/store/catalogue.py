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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds4mlx.store import block_file
from ds4mlx.store.block_file import TEMPORARY, DamagedFile, Header
from ds4mlx.store.journal import Journal

HALF_LIFE = 6 * 3600.0  # seconds after which a hit counts half
SUFFIX = ".kv"
LOG = logging.getLogger("ds4mlx")


@dataclass(frozen=True)
class Segment:
    """Rows and token ids of tokens start..end-1, behind the first `start` tokens of `parent`.

    Equal if they hold the same, whenever and however they were saved.
    """

    key: str
    model: str
    parent: str
    start: int
    end: int
    prefix: str  # public key of the first `end` tokens
    created: float = field(compare=False)
    label: str = field(compare=False)
    text_bytes: int = field(compare=False)  # of the text, in the last block; 0 if it is not kept
    nbytes: int = field(compare=False)


@dataclass(frozen=True)
class Record:
    """The boundary record after `tokens` tokens, which lie on the chain that ends with `segment`.

    Equal as segments are.
    """

    key: str
    model: str
    segment: str
    tokens: int
    prefix: str  # public key of these tokens
    text: str = field(compare=False)  # SHA1 of their text, empty if not known
    text_bytes: int = field(compare=False)
    reason: str = field(compare=False)
    created: float = field(compare=False)
    nbytes: int = field(compare=False)


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
        self._journal = Journal(directory / "index.jsonl")
        self._known: dict[str, dict[str, Any]] = {}  # key -> what the index says

    def path(self, item: Segment | Record) -> Path:
        """The file of a segment or record."""
        kind = "segments" if isinstance(item, Segment) else "records"
        return self.directory / kind / (item.key + SUFFIX)

    def refresh(self) -> None:
        """Take in what other processes, or this one, have added and removed."""
        news, anew = self._journal.news()
        if anew:
            self._known, self.uses = {}, {}
        for entry in news:
            self._take(entry)
        self._match("segments", self.segments, Segment)
        self._match("records", self.records, Record)

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
        """Move a damaged file out of the way, so that nothing is built upon it; warns once."""
        if path not in self.damaged:
            LOG.warning("KV store: %s; it is set apart, and its tokens are prefilled anew", cause)
        self.damaged.add(path)
        self.segments.pop(path.stem, None)
        self.records.pop(path.stem, None)
        with contextlib.suppress(OSError):
            path.rename(self.directory / "damaged" / path.name)

    def compact(self) -> None:
        """Write the index anew if most of it is about what is gone; needs the right to write."""
        with contextlib.suppress(OSError):
            size = os.stat(self._journal.path).st_size  # noqa: PTH116
            if size > 4096 + 1200 * (len(self.segments) + len(self.records)):
                self._journal.replace(self._entries())

    def chain(self, segment: str, tokens: int) -> list[tuple[Segment, int, int]] | None:
        """Segments from the first to this one with the tokens each gives; None if one is missing."""
        found, key, end = [], segment, tokens
        while key:
            held = self.segments.get(key)
            if held is None or not held.start < end <= held.end:
                return None
            found.append((held, held.start, end))
            key, end = held.parent, held.start
        return found[::-1] if end == 0 else None

    def on_chain(self, segment: str) -> Iterator[Record]:
        """The records on the chain that ends with a segment."""
        chain = self.chain(segment, self.segments[segment].end) or []
        ends = {held.key: end for held, _, end in chain}
        for record in self.records.values():
            if record.tokens <= ends.get(record.segment, 0):
                yield record

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(i.nbytes for kind in (self.segments, self.records) for i in kind.values())

    def leftovers(self) -> list[Path]:
        """Temporary files; nobody writes them now if one has the right to write."""
        folders = (self.directory, self.directory / "segments", self.directory / "records")
        return [path for folder in folders for path in folder.glob(f"*{TEMPORARY}")]

    def _take(self, entry: dict[str, Any]) -> None:
        if "add" in entry:
            self._known[entry["add"]["key"]] = entry["add"]
        elif "hit" in entry:
            self.uses.setdefault(entry["hit"], Use()).hit(entry["t"])
        elif "use" in entry:
            self.uses[entry["use"]] = Use(entry["value"], entry["total"], entry["t"])

    def _entries(self) -> Iterator[dict[str, Any]]:
        for item in (*self.segments.values(), *self.records.values()):
            yield {"add": asdict(item)}
        for key, use in self.uses.items():
            if key in self.records:
                yield {"use": key, "value": use.value, "total": use.total, "t": use.last}

    def _append(self, entries: list[dict[str, Any]]) -> None:
        with contextlib.suppress(OSError):
            self._journal.append(entries)

    def _match(self, folder: str, held: dict[str, Any], kind: type[Segment] | type[Record]) -> None:
        try:
            names = {
                e.name.removesuffix(SUFFIX)
                for e in os.scandir(self.directory / folder)
                if e.name.endswith(SUFFIX)
            }
        except FileNotFoundError:
            names = set()
        for gone in held.keys() - names:
            del held[gone]
        for key in names - held.keys():
            path = self.directory / folder / (key + SUFFIX)
            known = self._known.get(key)
            if path in self.damaged:
                continue
            try:
                item = kind(**known) if known else _read(path, kind)
            except (DamagedFile, TypeError) as error:
                self.set_apart(path, error)
                continue
            except OSError:
                continue
            if item.key == key:
                held[key] = item


def _read(path: Path, kind: type[Segment] | type[Record]) -> Segment | Record:
    """What a file's header says. Raises DamagedFile or FileNotFoundError."""
    with block_file.opened(path) as fd:
        item = described(block_file.read_header(fd, path), path, kind)
    if item.key != path.stem:
        raise DamagedFile(path, "holds what belongs under another name")
    return item


def described(header: Header, path: Path, kind: type[Segment] | type[Record]) -> Segment | Record:
    """The segment or record that a header describes. Raises DamagedFile."""
    try:
        return kind(**header.meta, nbytes=header.nbytes)
    except TypeError:
        raise DamagedFile(path, "its header describes something else") from None
