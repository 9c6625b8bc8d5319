"""Writes a model of random weights as a model directory that `load` and `verify` accept."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ds4mlx.bench.synth import check_memory, check_recipe, format_of, random_entry, weight_bytes
from ds4mlx.config import ModelConfig
from ds4mlx.durable import PARTIAL, Busy, lock, replacing, write_whole
from ds4mlx.errors import DataError
from ds4mlx.weights import tensor_file
from ds4mlx.weights.directory import CONFIG, FORMAT_VERSION, MANIFEST, canonical, planes
from ds4mlx.weights.inventory import Entry, inventory


def write_synth(
    config: ModelConfig,
    recipe: str,
    target: Path,
    on_file: Callable[[int, int], None] | None = None,
) -> int:
    """Write DIR `target`, which must be new or empty; bytes of its weight files.

    The manifest comes last, so that half a model never loads; what fails or is interrupted leaves
    nothing. `on_file` is told (files written, files in all). Raises DataError, before anything is
    written also where memory or the free disk cannot suffice.
    """
    check_recipe(recipe)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: is not an empty directory")
    check_memory(config, recipe, kept=False)
    try:
        _check_disk(target, weight_bytes(config, recipe))
        with _whole_or_nothing(target):
            return _write(config, recipe, target, on_file)
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror}") from error


@contextmanager
def _whole_or_nothing(target: Path) -> Iterator[None]:
    """Make a directory, and delete it with its files if the block fails; one process has it alone."""
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    fd = os.open(target, os.O_RDONLY)
    try:
        lock(fd, wait=False)
        try:
            yield
        except BaseException:
            for path in target.iterdir():
                path.unlink()
            if made:
                target.rmdir()
            raise
    except Busy:
        raise DataError(f"{target}: another process is writing here") from None
    finally:
        os.close(fd)


def _check_disk(target: Path, needed: int) -> None:
    there = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DataError(
            f"{target}: the weights need {needed / 1e9:.1f} GB of disk, of which "
            f"{free / 1e9:.1f} GB are free"
        )


def _write(config, recipe: str, target: Path, on_file) -> int:
    listed, seed = inventory(config), 0
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for done, (name, found) in enumerate(listed.items(), 1):
        arrays: dict[str, tuple[mx.array, Entry, str]] = {}
        for entry in found:
            seed += 1
            stored = format_of(recipe, entry, config)
            made = random_entry(entry, stored, config, seed)
            for plane in planes(entry, stored):
                arrays[plane.name] = (made[plane.plane], entry, plane.dtype)
        files[name], written = _write_file(target / name, arrays)
        for tensor, record in written.items():
            entry = arrays[tensor][1]
            tensors[tensor] = {
                **record,
                "file": name,
                "format": format_of(recipe, entry, config),
                "source": {"tensor": entry.official(), "files": []},
                "lossless": True,
            }
        mx.clear_cache()
        if on_file is not None:
            on_file(done, len(listed))
    text = (json.dumps(_config_values(config), indent=2) + "\n").encode()
    write_whole(target / CONFIG, text)
    weights = sum(each["bytes"] for each in files.values())
    files[CONFIG] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    write_whole(target / MANIFEST, canonical(_manifest(recipe, files, tensors)))
    return weights


def _write_file(path: Path, arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    """One weight file: its record in the manifest, and those of its tensors."""
    shapes = {name: (dtype, tuple(array.shape)) for name, (array, _, dtype) in arrays.items()}
    header, records = tensor_file.header(shapes), {}
    size = len(header)
    with (
        replacing(path, path.with_name(path.name + PARTIAL)) as temporary,
        temporary.open("wb") as out,
    ):
        out.write(header)
        for name, (array, _, dtype) in arrays.items():
            data = _bytes(array)
            out.write(data)
            size += len(data)
            records[name] = {
                "dtype": dtype,
                "shape": list(array.shape),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        out.flush()
    return {"bytes": size, "header_sha256": hashlib.sha256(header).hexdigest()}, records


def _bytes(array: mx.array) -> bytes:
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(raw).tobytes()


def _config_values(config: ModelConfig) -> dict[str, Any]:
    return {**config.model_dump(mode="json"), "architectures": ["DeepseekV4ForCausalLM"]}


def _manifest(recipe: str, files: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    from ds4mlx import __version__

    plan = hashlib.sha256(json.dumps([recipe, tensors], sort_keys=True).encode()).hexdigest()
    return {
        "format": FORMAT_VERSION,
        "ds4mlx": __version__,
        "plan": plan,
        "source": "random weights",
        "recipe": recipe,
        "release": "april",
        "importance": None,
        "files": files,
        "tensors": tensors,
    }
