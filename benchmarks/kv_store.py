"""Saving and restoring at V4-Flash's real shapes, against the raw disk.

States of synthetic bytes (43 layers, bfloat16, official rounding) are saved and restored. Each time
stands beside that of the same bytes read or written raw in the same run: raw writing is fsynced, and
before all reading the page cache is dropped for the files. Sizes are checked too.

    python benchmarks/kv_store.py --scratch DIR [--repeats 3] [--results FILE]

Needs about 1.5 GB of disk and 2 GB of memory.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from device import device

from ds4mlx import KVStore, ModelConfig
from ds4mlx.bench.synthetic_state import same_state, synthetic_state
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.kind import StateKind

TARGET = 1.5
BLOCK = 8 << 20


# States of Flash need its shapes only, and no weights.
FLASH = StateKind(ModelConfig(), mx.bfloat16, "official", "synthetic")


def main() -> None:
    """Run it; exit code 1 if a size is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        result = {"device": device(), **measured(Path(scratch), arguments.repeats)}
    print(json.dumps(result, indent=1))
    if arguments.results:
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not all(bound["holds"] for bound in result["bounds"].values()))


def measured(scratch: Path, repeats: int) -> dict:
    """Every figure."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, FLASH.config.vocab_size, 102_000)
    times = {}
    for count in (24_576, 100_000):
        state = synthetic_state(FLASH, tokens[:count], 2048)
        path = scratch / f"restore-{count}"
        store = KVStore(path, 1 << 40, kind=FLASH, min_free_bytes=0)
        store.save(tokens[:count], state)
        assert same_state(store.restore(tokens[:count])[0], state)
        del state
        times[f"restore {count}"] = compared(
            lambda p=path, n=count: timed_restore(p, tokens[:n]),
            lambda p=path: timed_read(files(p)),
            repeats,
        )
    sizes = grown(
        KVStore(scratch / "restore-100000", 1 << 40, kind=FLASH, min_free_bytes=0), tokens
    )
    state = synthetic_state(FLASH, tokens[:84_000], 2048)
    times["save 84000"] = compared(
        lambda: timed_save(scratch / "save", tokens[:84_000], state),
        lambda: timed_write(scratch / "raw"),
        repeats,
    )
    return {"times": times, "bounds": sizes}


def compared(ours: Callable[[], tuple[float, int]], raw: Callable[[], float], repeats: int) -> dict:
    """Medians of times taken in turn."""
    pairs = [(*ours(), raw()) for _ in range(repeats)]
    mine, nbytes, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{mine:.2f} s, raw {theirs:.2f} s, {nbytes / 1e6:.0f} MB", file=sys.stderr)
    return {
        "seconds": round(mine, 3),
        "raw_seconds": round(theirs, 3),
        "ratio": round(mine / theirs, 2),
        "target_ratio": TARGET,
        "bytes": int(nbytes),
        "all_seconds": [round(pair[0], 3) for pair in pairs],
        "all_raw_seconds": [round(pair[2], 3) for pair in pairs],
    }


def grown(store: KVStore, tokens: np.ndarray) -> dict:
    """What a stored conversation takes, and what appending to it writes."""
    count = 100_000
    records = sum(f.stat().st_size for f in (store.directory / "records").iterdir())
    rows = sum(f.stat().st_size for f in (store.directory / "segments").iterdir())
    appended = {}
    for end in (100_992, 100_991):  # a multiple of 128, and the length with most open projections
        state, found = store.restore(tokens[:count])
        longer = synthetic_state(FLASH, tokens[:end])
        longer.stored, before = state.stored, store.nbytes
        assert found == count
        store.save(tokens[:end], longer)
        appended[end] = store.nbytes - before
    return {
        "bytes per token of rows and ids": bound(rows / count, 3600),
        "100,000 tokens": bound(rows + records, 450e6),
        "boundary records of 100,000 tokens": bound(records, 80e6),
        "appending 992 tokens, to a multiple of 128": bound(appended[100_992], 8e6),
        "appending 991 tokens, to 127 beyond a multiple of 128": bound(appended[100_991], 19e6),
    }


def bound(value: float, most: float) -> dict:
    return {"value": round(value), "at_most": round(most), "holds": value <= most}


def files(path: Path) -> list[Path]:
    """The files of a store."""
    return sorted(path.rglob("*.kv"))


def drop(paths: list[Path]) -> None:
    """Drop the page cache for files, which must be on the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def timed_restore(path: Path, tokens: np.ndarray) -> tuple[float, int]:
    """Seconds from opening the store to the state, and the bytes read."""
    drop(files(path))
    begun = time.perf_counter()
    _, count = KVStore(path, 1 << 40, kind=FLASH).restore(tokens)
    seconds = time.perf_counter() - begun
    assert count == len(tokens)
    return seconds, sum(f.stat().st_size for f in (path / "segments").iterdir())


def timed_read(paths: list[Path]) -> float:
    """Seconds to read the segments raw."""
    paths = [path for path in paths if path.parent.name == "segments"]
    drop(paths)
    buffer, begun = memoryview(bytearray(BLOCK)), time.perf_counter()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        while os.readv(fd, [buffer]):
            pass
        os.close(fd)
    return time.perf_counter() - begun


def timed_save(path: Path, tokens: np.ndarray, state: DecodeState) -> tuple[float, int]:
    """Seconds of a save into an empty store, and the bytes written."""
    for file in files(path) if path.exists() else []:
        file.unlink()
    state.stored = None
    store = KVStore(path, 1 << 40, kind=FLASH, min_free_bytes=0)
    begun = time.perf_counter()
    store.save(tokens, state)
    return time.perf_counter() - begun, store.nbytes


def timed_write(path: Path) -> float:
    """Seconds to write as many bytes as the save, in one file, and fsync it."""
    left = sum(f.stat().st_size for f in files(path.parent / "save"))
    data = memoryview(np.random.default_rng(1).bytes(BLOCK))
    path.unlink(missing_ok=True)
    begun = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    while left > 0:
        left -= os.write(fd, data[: min(left, BLOCK)])
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


if __name__ == "__main__":
    main()
