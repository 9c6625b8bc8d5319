"""Putting what was taken out of a state on the disk, in any thread; acknowledged when it lasts."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ds4mlx.durable import sync_directory
from ds4mlx.errors import DataError
from ds4mlx.state.boundaries import Spacing
from ds4mlx.store import block_file, eviction
from ds4mlx.store.catalogue import Catalogue
from ds4mlx.store.eviction import StoreFull
from ds4mlx.store.items import segment_path
from ds4mlx.store.locks import Pin
from ds4mlx.store.taking import Job, Piece

HEADER_ROOM = 4096

Texts = Callable[[np.ndarray], list[bytes]]


@dataclass(frozen=True)
class Limits:
    """How much a store may take: of all its files, of the disk, and of a chain's records.

    min_free_bytes None: 1 GiB of the disk stays free, or a twentieth of a small one. Records of a
    chain beyond `records_bytes` are thinned out as far as `spacing` allows.
    """

    budget_bytes: int
    min_free_bytes: int | None
    records_bytes: int
    spacing: Spacing


class Writer:
    """Writes jobs: one process at a time, within the limits, each acknowledged when it lasts."""

    def __init__(self, catalogue: Catalogue, limits: Limits, texts: Texts | None, keep_text: bool):
        self.catalogue, self.limits = catalogue, limits
        self.texts, self.keep_text = texts, keep_text

    def write(self, job: Job) -> Pin | None:
        """Put a job on the disk: segments first, then the records that make them count.

        Returns a pin on its last segment, taken before anybody could evict it. Raises StoreFull, or
        OSError from the disk; then nothing of it counts.
        """
        self._add_texts(job)
        with self.catalogue.writing():
            for path in self.catalogue.leftovers():
                path.unlink(missing_ok=True)
            self.catalogue.refresh()
            segments = [p for p in job.segments if p.item.key not in self.catalogue.segments]
            records = [p for p in job.records if p.item.key not in self.catalogue.records]
            chain = self._chain(job)
            self._make_room([*segments, *records], chain)
            self._put("segments", segments)
            self._put("records", records)
            self._thin(job)
            self.catalogue.compact()
            return Pin.take(segment_path(self.catalogue.directory, job.segment))

    def _thin(self, job: Job) -> None:
        """Remove the boundary records of a job's chain that are one too many."""
        spacing, allowed = self.limits.spacing, self.limits.records_bytes
        for record in eviction.superfluous(self.catalogue, job.segment, spacing, allowed):
            if record.tokens != len(job.tokens):
                self.catalogue.remove(record)

    def _chain(self, job: Job) -> set[str]:
        """Keys of the job's chain; DataError if its beginning has been deleted."""
        new = {piece.item.key: piece.item for piece in job.segments}
        key, chain = job.segment, set()
        while key:
            segment = self.catalogue.segments.get(key) or new.get(key)
            if segment is None:
                raise DataError("the beginning of what is saved has been deleted meanwhile")
            chain.add(key)
            key = segment.parent
        return chain

    def _put(self, folder: str, pieces: Sequence[Piece]) -> None:
        """Write files; they last when this returns."""
        for piece in pieces:
            meta = asdict(piece.item)
            del meta["nbytes"]
            path = self.catalogue.path(piece.item)
            nbytes = block_file.write(path, meta, piece.blocks)
            piece.item = replace(piece.item, nbytes=nbytes)
        if pieces:
            sync_directory(self.catalogue.directory / folder)
            self.catalogue.add(*(piece.item for piece in pieces))

    def _make_room(self, pieces: Sequence[Piece], kept: set[str]) -> None:
        """Evict until the pieces fit into the budget and leave the least free disk space."""
        need = sum(HEADER_ROOM + sum(b.nbytes for b in piece.blocks) for piece in pieces)
        if not pieces:
            return
        if need > self.limits.budget_bytes:
            raise StoreFull(
                f"{need:,} bytes to save exceed the budget of {self.limits.budget_bytes:,}"
            )
        over = self.catalogue.nbytes + need - self.limits.budget_bytes
        free, least = self._disk()
        wanted = max(over, need + least - free)
        if wanted > 0:
            eviction.evict(self.catalogue, eviction.plan(self.catalogue, wanted, kept))

    def _disk(self) -> tuple[int, int]:
        """Bytes free on the disk, and how many of them must stay free."""
        disk = os.statvfs(self.catalogue.directory)
        least = min(1 << 30, disk.f_blocks * disk.f_frsize // 20)
        if self.limits.min_free_bytes is not None:
            least = self.limits.min_free_bytes
        return disk.f_bavail * disk.f_frsize, least

    def _add_texts(self, job: Job) -> None:
        """The digests by which a prefix is found by its text; and the text, if it is to be kept."""
        if self.texts is None:
            return
        pieces = self.texts(job.tokens)
        digest, done, size = hashlib.sha1(), 0, 0
        for piece in sorted(job.records, key=lambda p: p.item.tokens):
            new = b"".join(pieces[done : piece.item.tokens])
            digest.update(new)
            done, size = piece.item.tokens, size + len(new)
            piece.item = replace(piece.item, text=digest.hexdigest(), text_bytes=size)
        for piece in job.segments if self.keep_text else []:
            text = b"".join(pieces[piece.item.start : piece.item.end])
            piece.blocks.append(memoryview(text))
            piece.item = replace(piece.item, text_bytes=len(text))
