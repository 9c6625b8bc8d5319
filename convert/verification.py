"""Verify a model directory: every byte against its checksum, every value against its source."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ds4mlx.convert.encoder import row_chunks
from ds4mlx.convert.quantise import decode
from ds4mlx.convert.sources import Source, open_source
from ds4mlx.errors import DataError
from ds4mlx.weights.directory import STORED_TYPES, ModelDirectory, Plane, planes
from ds4mlx.weights.inventory import Entry
from ds4mlx.weights.tensor_file import TensorFile

BLOCK = 8 << 20


@dataclass(frozen=True)
class Checked:
    """A weight that is as recorded; `error` is |stored - source| / |source|, if that was asked."""

    name: str
    storage: str
    shape: tuple[int, ...]
    error: float | None


def verify(
    dst: str | Path,
    against: str | Path | None = None,
    progress: bool = True,
    *,
    mtp: str | Path | None = None,
) -> list[Checked]:
    """Check every file, header and tensor of `dst`; with `against`, the values too.

    against: the source that `dst` was made from; mtp: as for `convert`. Raises DataError naming the first file or
    tensor that is not as recorded. Returns one line a weight.
    """
    directory = ModelDirectory.open(dst)
    source = None if against is None else open_source(against, mtp)
    if source is not None and source.config != directory.config.model_copy(
        update={"release": source.config.release}
    ):
        raise DataError(f"{against}: its config.json describes another model than {dst}")
    _check_small_files(directory)
    found = []
    with tqdm(
        total=_work(directory), unit="B", unit_scale=True, disable=None if progress else True
    ) as bar:
        for name, entries in directory.inventory.items():
            file = TensorFile(directory.path / name)
            recorded = directory.manifest["files"][name]["header_sha256"]
            if hashlib.sha256(file.header).hexdigest() != recorded:
                raise DataError(f"{file.path}: header does not match its checksum")
            for entry in entries:
                storage = directory.storage(entry)
                for plane in planes(entry, storage):
                    _check_plane(directory, file, plane, bar)
                error = None if source is None else relative_error(file, entry, storage, source)
                found.append(Checked(entry.name, storage, entry.shape, error))
            file.close()
    return found


def _work(directory: ModelDirectory) -> int:
    return sum(listed["bytes"] for listed in directory.manifest["files"].values())


def _check_small_files(directory: ModelDirectory) -> None:
    for name, listed in directory.manifest["files"].items():
        if "sha256" in listed:
            data = (directory.path / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != listed["sha256"]:
                raise DataError(f"{directory.path / name}: does not match its checksum")


def _check_plane(directory: ModelDirectory, file: TensorFile, plane: Plane, bar: tqdm) -> None:
    running, nbytes = hashlib.sha256(), file.info(plane.name).nbytes
    for first in range(0, nbytes, BLOCK):
        block = file.read(plane.name, first, min(BLOCK, nbytes - first))
        running.update(block)
        bar.update(len(block))
    if running.hexdigest() != directory.manifest["tensors"][plane.name]["sha256"]:
        raise DataError(f"{file.path}: tensor {plane.name} does not match its checksum")


def relative_error(file: TensorFile, entry: Entry, storage: str, source: Source) -> float:
    """|stored - source| / |source| of one weight, both decoded exactly; chunk by chunk."""
    difference = size = 0.0
    for expert, rows in row_chunks(entry):
        wanted = source.values(entry, expert, rows.start, rows.stop).astype(np.float64)
        stored = {
            plane.plane: plane_rows(file, plane, entry, expert, rows)
            for plane in planes(entry, storage)
        }
        difference += float(((decode(storage, stored) - wanted) ** 2).sum())
        size += float((wanted**2).sum())
    return (difference / size) ** 0.5 if size else difference**0.5


def plane_rows(
    file: TensorFile, plane: Plane, entry: Entry, expert: int, rows: slice
) -> np.ndarray:
    """Rows of a stored plane, of one expert if it is a stack."""
    per_matrix = entry.shape[-2] if entry.kind == "experts" else 0
    width = plane.shape[-1] if len(plane.shape) > 1 else 1
    dtype = STORED_TYPES[plane.dtype]
    row_bytes = width * np.dtype(dtype).itemsize
    count = rows.stop - rows.start
    raw = file.read(plane.name, (expert * per_matrix + rows.start) * row_bytes, count * row_bytes)
    found = np.frombuffer(raw, dtype)
    return found.reshape(count, width) if len(plane.shape) > 1 else found
