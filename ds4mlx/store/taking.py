"""What of a state is new to the store: copied out in memory, so that the state may go on."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import mlx.core as mx
import numpy as np

from ds4mlx.state.decode_state import DecodeState, Stored
from ds4mlx.store import block_file, keys
from ds4mlx.store.catalogue import Catalogue
from ds4mlx.store.equals import Equals
from ds4mlx.store.items import Record, Segment
from ds4mlx.store.state_bytes import parts

# Most tokens of one segment: what is evicted at a time.
SEGMENT_TOKENS = 8192


Item = TypeVar("Item", Segment, Record)


@dataclass
class Piece(Generic[Item]):
    """A file to be written."""

    item: Item
    blocks: list[memoryview]


@dataclass
class Job:
    """A save that has been taken out of the state and is to be written."""

    tokens: np.ndarray
    segment: str  # the last one of the chain
    key: str  # public key of the prefix
    segments: list[Piece[Segment]] = field(default_factory=list)
    records: list[Piece[Record]] = field(default_factory=list)


class Taker:
    """Takes saves of one model for one directory."""

    def __init__(self, catalogue: Catalogue, model: str, label: str):
        self.catalogue, self.model, self.label = catalogue, model, label
        self.pending: dict[str, Segment] = {}  # taken, and not yet seen in the catalogue
        self.equals = Equals(catalogue, self.key_of)
        self.settled: list[str] = []  # those of which the writing has ended, well or not

    def take(self, tokens: np.ndarray, state: DecodeState, reason: str) -> Job:
        """Copy out what the store lacks of the first len(tokens) tokens; the state may then go on.

        Raises RewindError where the state cannot give the boundary at that length any more.
        """
        self._settle()
        end = len(tokens)
        mx.eval(state.arrays)
        positions = sorted({end, *(p for p in state.records if p < end)})
        boundary = np.array(state.record(end))
        last, done = self._known(tokens, state)
        job = Job(tokens, last, "")
        now = time.time()
        for start, stop in _spans(done, end):
            piece = self._segment(tokens, state, last, start, stop, now)
            job.segments.append(piece)
            last = piece.item.key
        job.segment = last
        names = keys.prefix_keys(tokens, [*positions, *(p.item.end for p in job.segments)])
        job.key = names[end]
        for piece in job.segments:
            piece.item = replace(piece.item, prefix=names[piece.item.end])
        taken = state.stored.records if state.stored is not None else {}
        places = {position: (position, state.drafts.lengths(position)) for position in positions}
        saved = {p: taken[at] for p, at in places.items() if self._has(taken.get(at), names[p])}
        for position in positions:
            holder = self._holder(job, position)
            if holder is None or (position in saved and position != end):
                continue
            record = boundary if position == end else np.array(state.record(position))
            why = reason if position == end else "boundary"
            job.records.append(self._record(holder, position, names[position], record, why))
        saved |= {piece.item.tokens: piece.item.key for piece in job.records}
        self.pending |= {piece.item.key: piece.item for piece in job.segments}
        known = {places[position]: key for position, key in saved.items()}
        state.stored = Stored(self.catalogue.directory, last, end, known)
        return job

    def _settle(self) -> None:
        ended = list(self.settled)
        self.catalogue.refresh()
        for key in ended:
            self.settled.remove(key)
            self.pending.pop(key, None)

    def _segment(
        self, tokens: np.ndarray, state: DecodeState, parent: str, start: int, end: int, now: float
    ) -> Piece[Segment]:
        """The file for tokens start..end-1, its public key left open."""
        ids = tokens[start:end]
        rows = [part.view(start, end).copy() for part in parts(state)]
        key = self.key_of(tokens, rows, parent, start, end)
        item = Segment(key, self.model, parent, start, end, "", now, self.label, 0, 0)
        return Piece(item, [block.data for block in (ids.view(np.uint8), *rows)])

    def key_of(
        self, tokens: np.ndarray, rows: list[np.ndarray], parent: str, start: int, end: int
    ) -> str:
        """The key of the segment that holds these rows."""
        sums = [block_file.checksum(block.data) for block in rows]
        return keys.segment_key(self.model, parent, start, tokens[start:end], sums)

    def _record(
        self, segment: str, tokens: int, prefix: str, record: np.ndarray, reason: str
    ) -> Piece[Record]:
        key = keys.record_key(self.model, segment, tokens, block_file.checksum(record.data))
        item = Record(key, self.model, segment, tokens, prefix, "", 0, reason, time.time(), 0)
        return Piece(item, [record.data])

    def _has(self, key: str | None, prefix: str) -> bool:
        """Whether the record of this key is stored, as that of this prefix."""
        record = self.catalogue.records.get(key or "")
        return record is not None and (record.model, record.prefix) == (self.model, prefix)

    def _find(self, key: str) -> Segment | None:
        return self.catalogue.segments.get(key) or self.pending.get(key)

    def _holder(self, job: Job, position: int) -> str | None:
        """The segment of the job's chain in which a position lies."""
        new = {piece.item.key: piece.item for piece in job.segments}
        key = job.segment
        while key:
            segment = new.get(key) or self._find(key)
            if segment is None:
                return None
            if segment.start < position:
                return key
            key = segment.parent
        return None

    def _known(self, tokens: np.ndarray, state: DecodeState) -> tuple[str, int]:
        """The last segment that the state's rows are stored in, and how many tokens that covers."""
        stored = state.stored
        if stored is None or stored.directory != self.catalogue.directory:
            return self._equal(tokens, state)
        key, done = stored.segment, min(stored.tokens, len(tokens))
        while key:
            segment = self._find(key)
            if segment is None:
                return self._equal(tokens, state)
            if segment.start < done:
                agrees = self._agrees(key, done, tokens)
                return (key, done) if agrees else self._equal(tokens, state)
            key, done = segment.parent, min(done, segment.start)
        return "", 0

    def _agrees(self, key: str, done: int, tokens: np.ndarray) -> bool:
        """Whether a whole chain is there, or about to be written, and has the first `done` tokens."""
        while key:
            segment = self._find(key)
            if segment is None or segment.model != self.model:
                return False
            if done == segment.end:
                if keys.prefix_keys(tokens, [done])[done] != segment.prefix:
                    return False
            elif key not in self.pending and self.equals.common(segment, tokens) < done:
                return False
            key, done = segment.parent, segment.start
        return True

    def _equal(self, tokens: np.ndarray, state: DecodeState) -> tuple[str, int]:
        """The longest stored chain that holds exactly these tokens and the state's rows."""
        last, done = "", 0
        while done < len(tokens):
            follower = self.equals.best(self._followers(last, done), tokens, state)
            if follower is None:
                break
            last, done = follower
        return last, done

    def _followers(self, parent: str, start: int) -> list[Segment]:
        return [
            segment
            for segment in [*self.catalogue.segments.values(), *self.pending.values()]
            if (segment.model, segment.parent, segment.start) == (self.model, parent, start)
        ]


def _spans(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Tokens start..end-1 cut at the multiples of SEGMENT_TOKENS."""
    while start < end:
        stop = min(end, (start // SEGMENT_TOKENS + 1) * SEGMENT_TOKENS)
        yield start, stop
        start = stop
