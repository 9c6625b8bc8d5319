"""Merges an adapter into a model directory: a new directory, whose adapted matrices hold the sum.

An adapted matrix of codes becomes bfloat16: what was learnt is smaller than the steps of few bits, so
rounding the sum to such again would lose most of it. Everything else keeps its bytes.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ds4mlx.convert import codecs
from ds4mlx.convert.comparison import stored_rows
from ds4mlx.convert.conversion import JOURNAL_SECONDS, check_space, ready, whole
from ds4mlx.convert.encoder import CHUNK, Rows
from ds4mlx.convert.journal import Journal
from ds4mlx.convert.plan import OutEntry, OutFile
from ds4mlx.convert.quantise import decode
from ds4mlx.convert.writer import FileWriter
from ds4mlx.durable import write_whole
from ds4mlx.errors import DataError
from ds4mlx.formats import FORMATS
from ds4mlx.formats.dense import Dense
from ds4mlx.model.linear import shapes
from ds4mlx.model.model import Model
from ds4mlx.weights.adapter import ADAPTERS, Adapter, read_adapter
from ds4mlx.weights.directory import MANIFEST, ModelDirectory, canonical
from ds4mlx.weights.inventory import Entry
from ds4mlx.weights.tensor_file import TensorFile


def merge(
    src: str | Path,
    adapter: str | Path,
    dst: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the model directory `dst`: that of `src` with an adapter in its matrices, and none beside.

    An adapted matrix of plain values keeps its type; one of codes is decoded, and its sum with the
    adapter is rounded to bfloat16, of which 256 experts of Flash take 4.3 GB a projection. All other
    weights keep their bytes. Goes on where it was interrupted. overwrite: replace what is in `dst`.
    Raises DataError naming file, tensor and cause.
    """
    base, target = ModelDirectory.open(src), Path(dst).expanduser()
    base.check_small_files()
    merged = Merged(base, read_adapter(adapter, shapes(Model(base.config))))
    plan = merged.fingerprint()
    if ready(target, base.path, plan, overwrite):
        return
    try:
        with contextlib.closing(Journal(target, plan)) as journal:
            _write(merged, target, journal, progress)
            journal.remove()
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror}") from error


class Merged:
    """The rows of a directory's weights with an adapter in them, as a writer asks for them."""

    def __init__(self, base: ModelDirectory, adapter: Adapter):
        self.base, self.adapter = base, adapter
        self._sources = {
            entry.name: base.path / name
            for name, found in base.inventory.items()
            for entry in found
        }
        self._opened: TensorFile | None = None
        self.files = [
            OutFile(name, [OutEntry(each, self._stored(each), lossless=True) for each in found])
            for name, found in base.inventory.items()
        ]

    def _stored(self, entry: Entry) -> str:
        """The format that an entry is written in."""
        stored = self.base.format_of(entry)
        coded = not isinstance(FORMATS[stored], Dense)
        return "bf16" if coded and entry.module in self.adapter.pairs else stored

    def rows(self, format: str, entry: Entry, expert: int, rows: slice) -> Rows:
        """Rows of an entry (of one expert if it is a stack), with what the adapter adds."""
        stored = self.base.format_of(entry)
        planes = stored_rows(self._file(entry), entry, stored, expert, rows)
        if entry.module not in self.adapter.pairs:
            return Rows(planes)
        values = decode(stored, planes) + np.array(self.adapter.added(entry.module, rows))
        if not np.isfinite(values).all():
            raise DataError(
                f"{self.adapter.path}: makes values of {entry.name} that are not finite"
            )
        return Rows({"weight": _rounded(values, format)})

    def _file(self, entry: Entry) -> TensorFile:
        """The file of an entry; one is open at a time."""
        path = self._sources[entry.name]
        if self._opened is None or self._opened.path != path:
            if self._opened is not None:
                self._opened.close()
            self._opened = TensorFile(path)
        return self._opened

    def fingerprint(self) -> str:
        """Digest of all that decides the bytes of the result."""
        learnt = hashlib.sha256((self.adapter.path / ADAPTERS).read_bytes()).hexdigest()
        parts = [self.base.manifest["checksum"], learnt, self.adapter.scale]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def manifest(self, journal: Journal) -> dict[str, Any]:
        """The manifest of the result. Raises DataError if weights that were copied are damaged."""
        content = {**self.base.manifest, "plan": self.fingerprint(), "files": {}, "tensors": {}}
        content["files"] = dict(self.base.manifest["files"])
        for file in self.files:
            header = hashlib.sha256(file.header).hexdigest()
            content["files"][file.name] = {"bytes": file.nbytes, "header_sha256": header}
            records = journal.done[file.name]["entries"]
            for out in file.entries:
                content["tensors"] |= self._listed(out, records[out.entry.name]["planes"])
        return content

    def _listed(self, out: OutEntry, checksums: dict[str, str]) -> dict[str, Any]:
        """An entry's lines of the manifest, one a plane."""
        before, merged = self.base.manifest["tensors"], out.entry.module in self.adapter.pairs
        lines: dict[str, Any] = {}
        for plane in out.planes:
            sha256 = checksums[plane.name]
            if not merged and before[plane.name]["sha256"] != sha256:
                raise DataError(
                    f"{self._sources[out.entry.name]}: tensor {plane.name} does not match its checksum"
                )
            line = {**before[plane.name], "sha256": sha256}
            if merged:
                line.pop("relative_errors", None)
                own = {"dtype": plane.dtype, "shape": [*plane.shape], "format": out.format}
                line |= {**own, "lossless": False}
            lines[plane.name] = line
        return lines


def _rounded(values: np.ndarray, format: str) -> np.ndarray:
    """float32 values as a plain format stores them."""
    if format == "bf16":
        return codecs.to_bf16(values)
    return values.astype(np.float16 if format == "f16" else np.float32)


def _write(merged: Merged, target: Path, journal: Journal, progress: bool) -> None:
    """Write what is not there yet; the manifest comes last."""
    done = [f for f in merged.files if f.name in journal.done and whole(target / f.name, f.nbytes)]
    left = [file for file in merged.files if file not in done]
    check_space(target, sum(file.nbytes for file in left))
    total = sum(file.nbytes for file in merged.files)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        bar.update(total - sum(file.nbytes for file in left))
        for file in left:
            sides = CHUNK, JOURNAL_SECONDS, bar.update
            writer = FileWriter(file, merged, target, journal, *sides)
            writer.write()
            journal.done[file.name] = {"entries": writer.records}
    for name, listed in merged.base.manifest["files"].items():
        if "sha256" in listed:
            write_whole(target / name, (merged.base.path / name).read_bytes())
    write_whole(target / MANIFEST, canonical(merged.manifest(journal)))
