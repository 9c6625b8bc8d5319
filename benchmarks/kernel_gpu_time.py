"""GPU time of the decode kernels alone, by NVIDIA's Nsight Compute: cold caches, no cost of launching.

    python benchmarks/kernel_gpu_time.py [--formats iq2_xxs] [--rows 1,2,4] [--groups 4,8,16] \
        [--results FILE]

Needs `ncu` on the PATH (or in $NCU). `--rows` and `--groups` try other values of the constants ROWS and
GROUPS at the top of each kernel's file; without them the set ones are used. `--formats` names gate's and
up's formats of the experts to take, and leaves the dense matrices out, which have no such constants. `--details FILE` writes what Nsight
Compute says of each launch.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
from nsight import profile, raw, table, value

from ds4mlx.bench.kernels import PAIRS, Experts
from ds4mlx.custom_kernels.cases import dense_hyper, dense_matvec, hyper_dense
from ds4mlx.custom_kernels.products import experts_down, experts_up

LAUNCHES = 3
DENSE = (dense_matvec, hyper_dense, dense_hyper)  # the cases of dense matrices
METRICS = ("gpu__time_duration.sum", "dram__bytes_read.sum")


def main() -> None:
    """Profile this file's launches, and print what each kernel took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="")
    parser.add_argument("--rows", default="")
    parser.add_argument("--groups", default="")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--details", type=Path)
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    combinations = [(r, g) for r in numbers(arguments.rows) for g in numbers(arguments.groups)]
    if arguments.launch:
        launch(arguments.formats, combinations)
        return
    only = ["--formats", arguments.formats]
    options = [*only, "--rows", arguments.rows, "--groups", arguments.groups]
    if arguments.details:
        arguments.details.write_text(profiled(["--set", "full"], only))
    found = summary(profiled(raw(METRICS), options))
    for row in found:
        print(
            f"{row['us']:8.1f} us {row['mb_read']:7.1f} MB {row['gb_per_s']:7.0f} GB/s {row['kernel']}"
        )
    if arguments.results:
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")


def numbers(text: str) -> list[int]:
    """Numbers with commas between them; one 0 if there are none."""
    return [int(n) for n in text.split(",") if n] or [0]


def profiled(wanted: list[str], options: list[str]) -> str:
    """What Nsight Compute prints of the launches, caches flushed before each."""
    wanted = [*wanted, "--cache-control", "all", "--target-processes", "all"]
    wanted += ["-k", "regex:custom_kernel_(experts|dense|hyper_dense)"]
    return profile(wanted, __file__, ["--launch", *options])


def summary(text: str) -> list[dict]:
    """A row for each kernel: median microseconds, and the bytes that came from memory."""
    units, launches = table(text)
    by_name: dict[str, list[dict]] = {}
    for row in launches:
        by_name.setdefault(row["Kernel Name"], []).append(row)

    def median(rows: list[dict], metric: str) -> float:
        return statistics.median(value(row[metric], units[metric]) for row in rows)

    found = []
    for name, rows in by_name.items():
        seconds, nbytes = (median(rows, metric) for metric in METRICS)
        found.append(
            {
                "kernel": name,
                "us": seconds * 1e6,
                "mb_read": nbytes / 1e6,
                "gb_per_s": nbytes / seconds / 1e9,
            }
        )
    return found


def launch(formats: str, combinations: list[tuple[int, int]]) -> None:
    """Each decode kernel a few times, one launch at a time."""
    if not formats:
        for _, call, x, _ in chain(*(cases.timed() for cases in DENSE)):
            for i in range(LAUNCHES):
                mx.eval(call(i, x))
    for module, call in launches(formats.split(",") if formats else []):
        kept = module.ROWS, module.GROUPS
        for rows, groups in combinations:
            module.ROWS, module.GROUPS = rows or kept[0], groups or kept[1]
            # What is tried may need more registers than there are: its launch is refused.
            with suppress(RuntimeError) if rows or groups else nullcontext():
                for i in range(LAUNCHES):
                    mx.eval(call(i))
        module.ROWS, module.GROUPS = kept


def launches(formats: list[str]) -> Iterator[tuple[Any, Callable[[int], mx.array]]]:
    """(module, call) of every kernel of experts at Flash's shapes, or of those in some formats."""
    for pair in (pair for pair in PAIRS if not formats or pair[0] in formats):
        layer = Experts(pair, 1)
        mx.eval(layer.hidden)
        for eight in (False, True) if pair[0] != "mxfp4" else (False,):
            yield experts_up, lambda i, one=layer, e=eight: one.up(i, one.x, e)
            yield experts_down, lambda i, one=layer, e=eight: one.down(i, one.hidden, e)


if __name__ == "__main__":
    main()
