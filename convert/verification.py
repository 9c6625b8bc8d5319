"""Verify a model directory: every byte against its checksum, every value against its source."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ds4mlx.convert.comparison import compare
from ds4mlx.convert.sources import Source, open_source
from ds4mlx.errors import DataError
from ds4mlx.weights.directory import ModelDirectory, Plane, planes
from ds4mlx.weights.inventory import Entry
from ds4mlx.weights.tensor_file import TensorFile

BLOCK = 8 << 20


@dataclass(frozen=True)
class Checked:
    """A weight whose bytes are as recorded, and what the comparison with its source gave.

    error: |stored - source| / |source|, None if no source was given; bound: the largest that passes,
    0 where the format holds the source's values exactly; cause: why it fails, None if it passes.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    error: float | None = None
    bound: float | None = None
    cause: str | None = None


def verify(
    dst: str | Path,
    against: str | Path | None = None,
    progress: bool = True,
    *,
    mtp: str | Path | None = None,
) -> list[Checked]:
    """Check every file, header and tensor of `dst`; with `against`, the values too.

    against: the source that `dst` was made from; mtp: as for `convert`. Returns one item a weight;
    where the values differ more than they may, its `cause` says so. Raises DataError naming the
    first file or tensor whose checksum, shape or type is not as recorded.
    """
    directory = ModelDirectory.open(dst)
    source = None if against is None else open_source(against, mtp)
    if source is not None and source.config != directory.config.model_copy(
        update={"release": source.config.release}
    ):
        raise DataError(f"{against}: its config.json describes another model than {dst}")
    directory.check_small_files()
    checked = []
    with tqdm(
        total=_work(directory), unit="B", unit_scale=True, disable=None if progress else True
    ) as bar:
        for name, entries in directory.inventory.items():
            file = TensorFile(directory.path / name)
            recorded = directory.manifest["files"][name]["header_sha256"]
            if hashlib.sha256(file.header).hexdigest() != recorded:
                raise DataError(f"{file.path}: header does not match its checksum")
            checked += [_check(directory, file, entry, source, bar) for entry in entries]
            file.close()
    return checked


def summary(checked: list[Checked], tensors: bool) -> str:
    """A line for every format, and with `tensors` one for every weight before them."""
    lines = [_line(each) for each in checked] if tensors else []
    for name in dict.fromkeys(each.format for each in checked):
        those = [each for each in checked if each.format == name]
        lines.append(f"{name:<8} {len(those):>5} weights{_error(those, 'largest relative error')}")
    return "\n".join(lines)


def _line(each: Checked) -> str:
    cause = f"  {each.cause}" if each.cause else ""
    return f"{'ok' if not cause else 'BAD':<3} {each.format:<7} {each.name}{_error([each], 'relative error')}{cause}"


def _error(those: list[Checked], what: str) -> str:
    errors = [each.error for each in those if each.error is not None]
    return f"  {what} {max(errors):.3g}" if errors else ""


def verdict(checked: list[Checked], dst: str | Path, against: str | Path | None) -> str:
    """One sentence for a directory that passes. Raises DataError naming the first weight that fails."""
    failed = [each for each in checked if each.cause]
    if failed:
        more = f"; so do {len(failed) - 1} more weights" if len(failed) > 1 else ""
        raise DataError(
            f"{dst}: tensor {failed[0].name} differs from {against}: {failed[0].cause}{more}"
        )
    text = f"{len(checked)} weights have the recorded checksums, shapes and types"
    if against is None:
        return text
    exact = sum(each.bound == 0 for each in checked)
    rest = len(checked) - exact
    text += f"; {exact} equal their source bit for bit"
    return text + (f", and {rest} differ by no more than their formats' rounding" if rest else "")


def _work(directory: ModelDirectory) -> int:
    return sum(listed["bytes"] for listed in directory.manifest["files"].values())


def _check(
    directory: ModelDirectory, file: TensorFile, entry: Entry, source: Source | None, bar: tqdm
) -> Checked:
    """One weight: its planes' checksums, then its values."""
    name = directory.format_of(entry)
    for plane in planes(entry, name):
        _check_plane(directory, file, plane, bar)
    if source is None:
        return Checked(entry.name, name, entry.shape)
    listed = directory.manifest["tensors"][entry.name]
    result = compare(file, entry, listed, source)
    return Checked(entry.name, name, entry.shape, result.error, result.bound, result.cause)


def _check_plane(directory: ModelDirectory, file: TensorFile, plane: Plane, bar: tqdm) -> None:
    running, nbytes = hashlib.sha256(), file.info(plane.name).nbytes
    for first in range(0, nbytes, BLOCK):
        block = file.read(plane.name, first, min(BLOCK, nbytes - first))
        running.update(block)
        bar.update(len(block))
    if running.hexdigest() != directory.manifest["tensors"][plane.name]["sha256"]:
        raise DataError(f"{file.path}: tensor {plane.name} does not match its checksum")
