"""GPU time of products of a few rows with one matrix at Flash's sizes, by NVIDIA's Nsight Compute.

    python benchmarks/dense_gpu_time.py [--matrices wq_b,wo_a,wo_b] [--rows 1,4] [--bandwidth 2925] \
        [--results FILE]

Needs `ncu` on the PATH (or in $NCU). Every launch reads other weights, more in turn than a cache keeps; so
clocks and caches are left as they are, as within a token. `--bandwidth`: what the GPU reads at most, GB/s.
"""

import argparse
import json
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import mlx.core as mx
from device import device
from nsight import profile, raw, table, value
from shapes import numbers

from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.cases.dense_matvec import BF16, FLASH, copies_of, nbytes_of
from ds4mlx.custom_kernels.products import dense_matvec

LAUNCHES = 5
METRIC = "gpu__time_duration.sum"


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
    wanted = ["--cache-control", "none", "--target-processes", "all"]
    wanted += ["-k", "regex:custom_kernel_dense", *raw((METRIC,))]
    units, launches = table(profile(wanted, __file__, ["--launch", *options]))
    return [1e6 * value(each[METRIC], units[METRIC]) for each in launches]


def row(name: str, rows: int, taken: list[float], bandwidth: float) -> dict:
    """What a product took: the median and the least, and the share of the bandwidth."""
    shapes, columns, _ = FLASH[name]
    us = statistics.median(taken)
    return {
        "matrix": name,
        "rows": rows,
        "us": round(us, 2),
        "least": round(min(taken), 2),
        "percent": round(nbytes_of(shapes, columns) / us / bandwidth / 10, 1),
    }


if __name__ == "__main__":
    main()
