"""GPU time of products of a few rows with one matrix at Flash's sizes, by NVIDIA's Nsight Compute.

    python benchmarks/dense_gpu_time.py [--matrices wq_b,wo_a,wo_b] [--rows 1,4] [--bandwidth 2925] \
        [--results FILE]

Needs `ncu` on the PATH (or in $NCU). Every launch reads other weights, more in turn than a cache keeps; so
clocks and caches are left as they are, as within a token. `--bandwidth`: what the GPU reads at most, GB/s.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import mlx.core as mx
from device import device
from shapes import numbers

from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.cases.dense_matvec import BF16, FLASH, copies_of
from ds4mlx.custom_kernels.products import dense_matvec
from ds4mlx.formats import FORMATS

LAUNCHES = 5
METRIC = "gpu__time_duration.sum"
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3}


def main() -> None:
    """Profile this file's launches, and print what each product took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrices", default="wq_b,wo_a,wo_b")
    parser.add_argument("--rows", type=numbers, default=[1, 4])
    parser.add_argument("--bandwidth", type=float, default=2925)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asked = [(name, rows) for name in arguments.matrices.split(",") for rows in arguments.rows]
    if arguments.launch:
        launch(asked)
        return
    taken = iter(profiled(sys.argv[1:]))
    found = [
        row(name, rows, [next(taken) for _ in range(LAUNCHES)], arguments.bandwidth)
        for name, rows in asked
    ]
    for each in found:
        print("{matrix}, {rows} rows: {us} us, {percent} %".format(**each))
    if arguments.results:
        kept = {
            "date": str(datetime.now(UTC).date()),
            "device": device(),
            "of": f"percent of {arguments.bandwidth:g} GB/s",
            "rows": found,
        }
        arguments.results.write_text(json.dumps(kept, indent=1) + "\n")


def launch(asked: list[tuple[str, int]]) -> None:
    """Every product LAUNCHES times, one launch at a time."""
    for name, rows in asked:
        shapes, columns, groups = FLASH[name]
        copies, _ = copies_of(shapes, columns)
        x = normal((rows, groups, columns) if groups else (rows, columns), BF16, 1)
        mx.eval(x)
        for i in range(LAUNCHES):
            mx.eval(dense_matvec.by_kernel(copies[i % len(copies)], x))


def profiled(options: list[str]) -> list[float]:
    """Microseconds of the launches of this file, in their order."""
    ncu = os.environ.get("NCU", "ncu")
    wanted = ["--cache-control", "none", "--clock-control", "none", "--target-processes", "all"]
    wanted += ["--csv", "--page", "raw", "--metrics", METRIC, "-k", "regex:custom_kernel_dense"]
    command = [ncu, *wanted, sys.executable, __file__, "--launch", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    lines = done.stdout.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    units, *launches = csv.DictReader(lines[begin:])
    scale = MICROSECONDS[units[METRIC]]
    return [float(each[METRIC].replace(",", "")) * scale for each in launches]


def row(name: str, rows: int, taken: list[float], bandwidth: float) -> dict:
    """What a product took: the median and the least, and the share of the bandwidth."""
    shapes, columns, _ = FLASH[name]
    nbytes = sum(FORMATS[kind].bits / 8 * n * columns for kind, n in shapes)
    us = statistics.median(taken)
    return {
        "matrix": name,
        "rows": rows,
        "us": round(us, 2),
        "least": round(min(taken), 2),
        "percent": round(nbytes / us / bandwidth / 10, 1),
    }


if __name__ == "__main__":
    main()
