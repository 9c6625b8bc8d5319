"""What a conversion will write: files, tensors, formats and sizes; known before anything is written."""

import hashlib
import json
import math
from dataclasses import dataclass

from ds4mlx import tensor_file
from ds4mlx.convert.recipes import check_recipe, storage
from ds4mlx.convert.source import Source
from ds4mlx.directory import FORMAT_VERSION, TYPE_BITS, Plane, planes
from ds4mlx.inventory import COMPONENTS, Entry


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write: one plane of an entry."""

    entry: Entry
    plane: Plane
    storage: str
    lossless: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.plane.shape) * TYPE_BITS[self.plane.dtype] // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one matrix."""
        *_, width = self.plane.shape if len(self.plane.shape) > 1 else (1,)
        return width * TYPE_BITS[self.plane.dtype] // 8


@dataclass(frozen=True)
class OutFile:
    """A weight file to write."""

    name: str
    tensors: list[OutTensor]

    @property
    def header(self) -> bytes:
        return tensor_file.header(
            {t.plane.name: (t.plane.dtype, t.plane.shape) for t in self.tensors}
        )

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


class Plan:
    """The whole output of one conversion; `str(plan)` is what `--dry-run` prints."""

    def __init__(self, source: Source, recipe: str, release: str | None):
        check_recipe(recipe)
        self.source, self.recipe = source, recipe
        self.release = release or source.config.release
        self.files = []
        for name, entries in source.inventory.items():
            tensors = []
            for entry in entries:
                chosen, lossless = storage(recipe, entry, source)
                tensors += [OutTensor(entry, p, chosen, lossless) for p in planes(entry, chosen)]
            self.files.append(OutFile(name, tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.nbytes for file in self.files)

    def fingerprint(self) -> str:
        """Digest of everything that decides the output's bytes."""
        parts = [FORMAT_VERSION, self.recipe, self.release, self.source.fingerprint()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def classes(self) -> list[tuple[str, str, str, bool, int]]:
        """(component, type in the source, storage format, bit-exact, bytes) of every class of tensors."""
        sums: dict[tuple[str, str, str, bool], int] = {}
        for tensor in (t for file in self.files for t in file.tensors):
            found = self.source.dtype(tensor.entry)
            key = (tensor.entry.component, found, tensor.storage, tensor.lossless)
            sums[key] = sums.get(key, 0) + tensor.nbytes
        ordered = sorted(sums.items(), key=lambda item: (COMPONENTS.index(item[0][0]), item[0][1:]))
        return [(*key, size) for key, size in ordered]

    def __str__(self) -> str:
        rows = [f"{'tensors':<18} {'source':<9} {'stored as':<10} {'values':<12} {'bytes':>18}"]
        for what, found, chosen, lossless, size in self.classes():
            values = "bit-exact" if lossless else "rounded"
            rows.append(f"{what:<18} {found:<9} {chosen:<10} {values:<12} {size:>18,}")
        total = f"{len(self.files)} weight files, {self.nbytes:,} bytes, recipe {self.recipe}"
        return "\n".join([*rows, f"{total}, release {self.release}"])
