"""What a conversion will write: files, tensors, formats and sizes; known before anything is written."""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property

from ds4mlx.convert.choice import Choice
from ds4mlx.convert.encoder import Encoder
from ds4mlx.convert.importance import Importance
from ds4mlx.convert.moments import Moments
from ds4mlx.convert.quantise import QUANTISERS, quantisers_version
from ds4mlx.convert.quantise_fed import FED
from ds4mlx.convert.recipes import choose_recipe, format_of
from ds4mlx.convert.schedule import Schedule
from ds4mlx.convert.sources import Source
from ds4mlx.formats import TAGS
from ds4mlx.weights import tensor_file
from ds4mlx.weights.directory import FORMAT_VERSION, Plane, planes
from ds4mlx.weights.inventory import COMPONENTS, Entry


@dataclass(frozen=True)
class OutEntry:
    """A weight to write."""

    entry: Entry
    format: str
    lossless: bool

    @cached_property
    def planes(self) -> list[Plane]:
        """The arrays it becomes."""
        return planes(self.entry, self.format)

    @property
    def quantised(self) -> bool:
        """Whether writing it rounds to a few bits."""
        return not self.lossless and self.format in QUANTISERS

    @property
    def rows(self) -> int:
        """Rows of all its matrices together."""
        return math.prod(self.entry.shape[: max(1, len(self.entry.shape) - 1)])

    @property
    def nbytes(self) -> int:
        return sum(plane_bytes(plane) for plane in self.planes)

    def row_bytes(self, plane: Plane) -> int:
        """Bytes that one row takes in a plane."""
        return plane_bytes(plane) // self.rows


def plane_bytes(plane: Plane) -> int:
    return math.prod(plane.shape) * TAGS[plane.dtype].nbytes


@dataclass(frozen=True)
class OutFile:
    """A weight file to write."""

    name: str
    entries: list[OutEntry]

    @cached_property
    def header(self) -> bytes:
        """The bytes before the first tensor's."""
        listed = (plane for out in self.entries for plane in out.planes)
        return tensor_file.header({p.name: (p.dtype, p.shape) for p in listed})

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(out.nbytes for out in self.entries)


class Plan:
    """The whole output of one conversion; `str(plan)` is what `--dry-run` prints."""

    def __init__(
        self,
        source: Source,
        recipe: str | None,
        release: str | None,
        importance: Importance | None = None,
        keep_download: bool = False,
        moments: Moments | None = None,
        choice: Choice | None = None,
    ):
        self.source, self.importance, self.keep_download = source, importance, keep_download
        self.moments, self.choice = moments, choice
        self.recipe = choose_recipe(recipe, source)
        self.release = release or source.config.release
        self.encoder = Encoder(source, importance, moments)
        self.files = [
            OutFile(
                name, [OutEntry(e, *format_of(self.recipe, e, source, choice)) for e in entries]
            )
            for name, entries in source.inventory.items()
        ]
        if importance is not None:
            importance.check(out.entry for out in self.entries if out.quantised)
        if moments is not None:
            moments.check(source)

    @property
    def entries(self) -> list[OutEntry]:
        """Every weight, in file order."""
        return [out for file in self.files for out in file.entries]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.nbytes for file in self.files)

    @property
    def feeds_back(self) -> bool:
        """Whether second moments steer any of it."""
        quantised = (out for out in self.entries if out.quantised)
        return self.moments is not None and any(out.format in FED for out in quantised)

    def schedule(self, left: list[OutFile], there: set[str]) -> Schedule[OutFile]:
        """The order in which to write the files `left`, with the downloads `there` on the disk."""
        needs = {
            f.name: set().union(*(self.source.remote(o.entry) for o in f.entries)) for f in left
        }
        sizes = self.source.downloads.sizes() if self.source.downloads else {}
        return Schedule(left, needs, sizes, there, self.keep_download)

    def peak(self) -> str:
        """What a conversion from the hub takes on the disk; nothing for a local source."""
        if self.source.downloads is None:
            return ""
        schedule = self.schedule(self.files, set())
        fate = "kept" if self.keep_download else "each file deleted once it is converted"
        return (
            f"{schedule.downloaded:,} bytes to download, {fate}; "
            f"disk at the peak: {schedule.peak:,} bytes"
        )

    def fingerprint(self) -> str:
        """Digest of everything that decides the output's bytes."""
        steered = self.importance.fingerprint if self.importance else None
        parts = [FORMAT_VERSION, self.recipe, self.release, self.source.fingerprint(), steered]
        if self.moments is not None:
            parts.append(self.moments.fingerprint)
        if self.choice is not None:
            parts.append(self.choice.listed)
        if any(out.quantised for out in self.entries):
            parts.append(quantisers_version())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def classes(self) -> list[tuple[str, str, str, bool, int]]:
        """(component, type in the source, format, bit-exact, bytes) of every class of tensors."""
        sums: dict[tuple[str, str, str, bool], int] = {}
        for out in self.entries:
            found = self.source.dtype(out.entry)
            key = (out.entry.component, found, out.format, out.lossless)
            sums[key] = sums.get(key, 0) + out.nbytes
        ordered = sorted(sums.items(), key=lambda item: (COMPONENTS.index(item[0][0]), item[0][1:]))
        return [(*key, size) for key, size in ordered]

    def __str__(self) -> str:
        rows = [f"{'tensors':<18} {'source':<9} {'stored as':<10} {'values':<12} {'bytes':>18}"]
        for what, found, chosen, lossless, size in self.classes():
            values = "bit-exact" if lossless else "rounded"
            rows.append(f"{what:<18} {found:<9} {chosen:<10} {values:<12} {size:>18,}")
        total = f"{len(self.files)} weight files, {self.nbytes:,} bytes, recipe {self.recipe}"
        rows += [f"{total}, release {self.release}", *filter(None, [self.peak()])]
        return "\n".join(rows)
