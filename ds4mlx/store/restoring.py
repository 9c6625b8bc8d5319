"""From a prompt to the longest stored prefix of it, and from the files to the state."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import mlx.core as mx
import numpy as np

from ds4mlx.state.changes import changes
from ds4mlx.state.decode_state import DecodeState, Stored
from ds4mlx.state.kind import StateKind
from ds4mlx.store import block_file, keys
from ds4mlx.store.block_file import DamagedFile, Header, OtherVersion
from ds4mlx.store.catalogue import Catalogue
from ds4mlx.store.items import Record, Segment, described
from ds4mlx.store.state_bytes import Part, complete, empty_rows, parts

# Segments read at a time.
READERS = 4


class Place:
    """Room for the rows of a part, which is made while the first blocks are read already."""

    def __init__(self, part: Part):
        self._part, self.made = part, Event()

    def make(self) -> None:
        """Have the room made."""
        if self._part.rows.buffer is not None:
            mx.eval(self._part.rows.buffer)
        self.made.set()

    def view(self, start: int, end: int) -> np.ndarray:
        """The bytes of the rows of tokens start..end-1, as soon as there is room for them."""
        self.made.wait()
        return self._part.view(start, end)


class WrongIndex(Exception):
    """The index says of a file what its own header does not."""

    def __init__(self, item: Segment | Record):
        self.item = item
        super().__init__(item.key)


NOT_TO_BE_READ = (DamagedFile, OtherVersion, WrongIndex, FileNotFoundError)


def _passed_over(catalogue: Catalogue, error: Exception) -> None:
    """Have the catalogue know why a file is not used."""
    if isinstance(error, DamagedFile):
        catalogue.set_apart(error.path, error)
    elif isinstance(error, WrongIndex):
        catalogue.correct(error.item)


def matches(catalogue: Catalogue, model: str, tokens: np.ndarray) -> Iterator[Record]:
    """Records of prefixes of `tokens` whose chains are whole, longest first, then newest."""
    ours = [r for r in catalogue.records.values() if r.model == model and r.tokens <= len(tokens)]
    names = keys.prefix_keys(tokens, (record.tokens for record in ours))
    equal = [record for record in ours if record.prefix == names[record.tokens]]
    for record in sorted(equal, key=lambda r: (r.tokens, r.created), reverse=True):
        if catalogue.chain(record.segment, record.tokens) is not None:
            yield record


def read_state(
    catalogue: Catalogue, kind: StateKind, record: Record, tokens: np.ndarray
) -> DecodeState | None:
    """The state that a record and its chain hold.

    None if a file has gone, or is damaged: it is then set apart. Nothing unchecked is ever used.
    The record is one that was made under the changes in force.
    """
    chain = catalogue.chain(record.segment, record.tokens)
    if chain is None:
        return None
    state = empty_rows(kind, record.tokens)
    places = [Place(part) for part in parts(state)]

    def read(link: tuple[Segment, int, int]) -> None:
        segment, start, end = link
        ids = _read_segment(catalogue, segment, start, end, places)
        if not np.array_equal(ids, tokens[start:end]):
            raise DamagedFile(catalogue.path(record), "its chain holds other tokens than it says")

    try:
        boundary = _record_bytes(catalogue, record)
        with ThreadPoolExecutor(READERS) as readers:
            reading = readers.map(read, chain)
            try:
                for place in places:  # in this thread, which is the one that may use MLX
                    place.make()
            finally:
                for place in places:
                    place.made.set()
            list(reading)
    except NOT_TO_BE_READ as error:
        _passed_over(catalogue, error)
        return None
    complete(state, boundary, record.tokens)
    state.stored = Stored(catalogue.directory, record.segment, record.tokens)
    state.made_under = frozenset([changes()])
    return state


def read_tokens(catalogue: Catalogue, record: Record) -> np.ndarray | None:
    """The token ids of the prefix that a record stands for; None as `read_state`."""
    pieces = []
    try:
        for segment, start, end in catalogue.chain(record.segment, record.tokens) or []:
            pieces.append(_read_segment(catalogue, segment, start, end, ()))
    except NOT_TO_BE_READ as error:
        _passed_over(catalogue, error)
        return None
    return np.concatenate(pieces) if pieces else None


def read_ids(catalogue: Catalogue, segment: Segment) -> np.ndarray | None:
    """The token ids of a segment; None if it has gone or is damaged."""
    try:
        return _read_segment(catalogue, segment, segment.start, segment.end, ())
    except NOT_TO_BE_READ:
        return None


def read_rows(
    catalogue: Catalogue, segment: Segment, compressors: list[Part]
) -> list[np.ndarray] | None:
    """The rows of a segment, bytes for every part; None if it has gone or is damaged."""
    path = catalogue.path(segment)
    try:
        with block_file.opened(path) as fd:
            header = checked_header(fd, path, segment)
            blocks = [np.empty(size, np.uint8) for size in header.sizes[: len(compressors) + 1]]
            block_file.read_blocks(fd, path, header, (block.data for block in blocks))
    except NOT_TO_BE_READ as error:
        _passed_over(catalogue, error)
        return None
    return blocks[1:]


def read_text(catalogue: Catalogue, segment: Segment) -> str:
    """The text that was kept with a segment, if it was."""
    path = catalogue.path(segment)
    with block_file.opened(path) as fd:
        header = block_file.read_header(fd, path)
        size = header.meta["text_bytes"]
        return os.pread(fd, size, header.nbytes - size).decode(errors="replace")


def _read_segment(
    catalogue: Catalogue, segment: Segment, start: int, end: int, into: Sequence[Place]
) -> np.ndarray:
    """Read the rows of tokens start..end-1 to their places, if any; returns the token ids."""
    path = catalogue.path(segment)
    with block_file.opened(path) as fd:
        header = checked_header(fd, path, segment)
        ids = np.empty(header.sizes[0], np.uint8)
        if len(header.sizes) <= len(into):
            raise DamagedFile(path, "has fewer blocks than the model")
        buffers = _buffers(ids, header.sizes, start, end, into)
        block_file.read_blocks(fd, path, header, buffers)
    return ids.view("<i4")[: end - start]


def _buffers(
    ids: np.ndarray, sizes: list[int], start: int, end: int, into: Sequence[Place]
) -> Iterator[memoryview]:
    """Where the blocks of a segment go, each once its place is there."""
    yield ids.data
    for place, size in zip(into, sizes[1:], strict=False):
        target = place.view(start, end)
        if target.nbytes == size:
            yield target.data
        else:  # a block is checked whole, also where only its beginning is wanted
            whole = np.empty(size, np.uint8)
            yield whole.data
            target[:] = whole[: target.nbytes]


def _record_bytes(catalogue: Catalogue, record: Record) -> np.ndarray:
    path = catalogue.path(record)
    with block_file.opened(path) as fd:
        header = checked_header(fd, path, record)
        boundary = np.empty(header.sizes[0], np.uint8)
        block_file.read_blocks(fd, path, header, (boundary.data,))
    return boundary


def checked_header(fd: int, path: Path, item: Segment | Record) -> Header:
    """The header, which must describe what the catalogue says is there; an index may be wrong."""
    header = block_file.read_header(fd, path)
    if described(header, path, type(item)) != item:
        raise WrongIndex(item)
    return header
