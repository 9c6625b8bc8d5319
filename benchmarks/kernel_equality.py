"""Every kernel against its reference on this GPU: the comparisons of the tests, and larger ones.

    MLX_ENABLE_TF32=0 python benchmarks/kernel_equality.py [--small] [--jobs N] [--results FILE]

Kernels are compiled when they are first used, on NVIDIA for two seconds each, so the comparisons are
shared among N processes. Exits with 1 if one is too far off. (TF32, MLX's default on NVIDIA GPUs, would make the float32
references themselves less exact than what they are to show.)
"""

import argparse
import json
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
from device import device

from ds4mlx.bench.kernel_cases_large import large_cases
from ds4mlx.custom_kernels import dialect
from ds4mlx.custom_kernels.cases import modules as cases
from ds4mlx.custom_kernels.cases.base import TOLERANCE, Case


def main() -> None:
    """Run all comparisons and keep what they gave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="leave out Flash's own shapes")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if dialect.target() is None:
        sys.exit("kernels run on a GPU, and MLX has none here")
    jobs = [(part, arguments.jobs, arguments.small) for part in range(arguments.jobs)]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        rows = [row for part in pool.map(share, jobs) for row in part]
    bad = [row for row in rows if not row["ok"]]
    found = {"device": device(), "mlx": installed(), "target": dialect.target(), "cases": rows}
    if arguments.results:
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(rows) - len(bad)} of {len(rows)} comparisons within their tolerance")
    sys.exit(1 if bad else 0)


def share(job: tuple[int, int, bool]) -> list[dict]:
    """Every so many-th comparison: part, parts, and whether Flash's own shapes are left out."""
    part, parts, small = job
    large = [] if small else [large_cases()]
    found = chain(cases.small(), cases.wide(), *large)
    return [run(case) for case in islice(found, part, None, parts)]


def run(case: Case) -> dict:
    """One comparison; a kernel that does not compile or run counts as infinitely far off."""
    begun = time.perf_counter()
    try:
        error = case.error()
    except Exception:  # noqa: BLE001 - the others go on
        traceback.print_exc()
        error = float("inf")
    tolerance = TOLERANCE[case.dtype]
    kind = str(case.dtype).rpartition(".")[2]
    seconds = time.perf_counter() - begun
    print(
        f"{'ok ' if error <= tolerance else 'BAD'} {error:9.2e} {kind:<8} {case.name} ({seconds:.1f} s)"
    )
    sys.stdout.flush()
    mx.clear_cache()
    return {"name": case.name, "type": kind, "error": error, "ok": error <= tolerance}


def installed() -> str:
    """MLX's version; a copy that was unpacked by hand has none."""
    try:
        return version("mlx")
    except PackageNotFoundError:
        return mx.__version__  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
