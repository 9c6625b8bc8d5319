"""Writes one weight file, a chunk of rows at a time, so that it can stop and go on anywhere.

The file is `NAME.partial` until its last byte is on the disk. Every few seconds the journal notes how
far it is; going on re-reads what is there and compares its checksums before trusting it.
"""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds4mlx.convert.encoder import RowMaker, Rows, row_chunks
from ds4mlx.convert.journal import Journal
from ds4mlx.convert.plan import OutEntry, OutFile, plane_bytes
from ds4mlx.convert.quantise import Loss
from ds4mlx.durable import PARTIAL, sync, sync_directory, take_place
from ds4mlx.weights.inventory import experts

BLOCK = 8 << 20


class EntryWriter:
    """Writes the planes of one entry side by side; each has its place in the file."""

    def __init__(self, fd: int, out: OutEntry, position: int, advance: Callable[[int], Any]):
        self.fd, self.out, self.advance = fd, out, advance
        self.places: dict[str, int] = {}  # plane -> where it begins in the file
        for plane in out.planes:
            self.places[plane.plane] = position
            position += plane_bytes(plane)
        self.running = {plane.plane: hashlib.sha256() for plane in out.planes}
        self.loss = Loss()
        self.errors: list[float] = []  # relative error of every quantised matrix in place
        self.done = 0  # rows in place

    def matches(self, record: dict[str, Any]) -> bool:
        """Take up a record of rows in place, if the bytes it vouches for are there."""
        rows = record["rows"]
        for plane in self.out.planes:
            nbytes = rows * self.out.row_bytes(plane)
            running = digest(self.fd, self.places[plane.plane], nbytes)
            if running.hexdigest() != record["planes"][plane.name]:
                return False
            self.running[plane.plane] = running
        self.done, self.loss = rows, Loss(*record["loss"])
        self.errors = list(record["errors"])
        return True

    def skip(self) -> None:
        """Count what is in place as written."""
        self.advance(self.done * sum(self.out.row_bytes(plane) for plane in self.out.planes))

    def put(self, rows: Rows, count: int) -> None:
        """Write the next `count` rows."""
        for plane in self.out.planes:
            data = rows.planes[plane.plane].tobytes()
            write_at(
                self.fd, data, self.places[plane.plane] + self.done * self.out.row_bytes(plane)
            )
            self.running[plane.plane].update(data)
            self.advance(len(data))
        self.done += count
        self.loss = self.loss.plus(rows.loss)
        if self.out.quantised:
            self.errors.append(float(f"{rows.loss.relative:.7g}"))

    def record(self) -> dict[str, Any]:
        """What is in place now: rows, checksum of each plane so far, loss, and errors."""
        names = {plane.plane: plane.name for plane in self.out.planes}
        checksums = {names[plane]: running.hexdigest() for plane, running in self.running.items()}
        losses = {"loss": list(self.loss), "errors": list(self.errors)}
        return {"rows": self.done, "planes": checksums, **losses}


class FileWriter:
    """One weight file in the making. `advance` is told of every byte that is in place."""

    def __init__(
        self,
        file: OutFile,
        encoder: RowMaker,
        directory: Path,
        journal: Journal,
        chunk: int,
        seconds: float,
        advance: Callable[[int], Any],
    ):
        self.file, self.encoder, self.journal = file, encoder, journal
        self.chunk, self.seconds, self.advance = chunk, seconds, advance
        self.path = directory / file.name
        self.partial = directory / (file.name + PARTIAL)
        self.records: dict[str, dict[str, Any]] = {}  # entry -> record, of those begun
        self.noted = time.monotonic()

    def write(self) -> None:
        """Write or finish the file and note it in the journal."""
        fd = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._write(fd, self._trusted(fd))
            take_place(fd, self.partial, self.path)
        finally:
            os.close(fd)
        sync_directory(self.path.parent)
        header = hashlib.sha256(self.file.header).hexdigest()
        self.journal.append({"file": self.file.name, "header": header, "entries": self.records})

    def _trusted(self, fd: int) -> dict[str, Any]:
        """The journal's records of this file, if its header is in place; else an empty file."""
        note = self.journal.progress.get(self.file.name)
        if note is not None and os.pread(fd, len(self.file.header), 0) == self.file.header:
            return note["entries"]
        os.ftruncate(fd, 0)
        write_at(fd, self.file.header, 0)
        return {}

    def _write(self, fd: int, trusted: dict[str, Any]) -> None:
        position = len(self.file.header)
        self.advance(position)
        for out in self.file.entries:
            writer = EntryWriter(fd, out, position, self.advance)
            record = trusted.get(out.entry.name)
            if record is not None and writer.matches(record):
                writer.skip()
            self._fill(fd, writer)
            position += out.nbytes

    def _fill(self, fd: int, writer: EntryWriter) -> None:
        """Write the rows that are not in place yet."""
        out, end, per_matrix = writer.out, 0, writer.out.rows // experts(writer.out.entry)
        for expert, rows in row_chunks(out.entry, self.chunk, whole=out.quantised):
            end = expert * per_matrix + rows.stop
            if end > writer.done:
                start = max(rows.start, writer.done - expert * per_matrix)
                encoded = self.encoder.rows(out.format, out.entry, expert, slice(start, rows.stop))
                writer.put(encoded, rows.stop - start)
                self.records[out.entry.name] = writer.record()
                self._note(fd)
        self.records[out.entry.name] = writer.record()

    def _note(self, fd: int) -> None:
        """Tell the journal now and then."""
        if time.monotonic() - self.noted >= self.seconds:
            sync(fd)
            self.journal.append({"file": self.file.name, "entries": self.records})
            self.noted = time.monotonic()


def write_at(fd: int, data: bytes, position: int) -> None:
    """Write all of `data` at `position`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, position)
        view, position = view[written:], position + written


def digest(fd: int, position: int, nbytes: int) -> "hashlib._Hash":
    """Running SHA-256 of bytes of a file."""
    running = hashlib.sha256()
    while nbytes:
        block = os.pread(fd, min(BLOCK, nbytes), position)
        if not block:
            break
        running.update(block)
        position, nbytes = position + len(block), nbytes - len(block)
    return running
