"""GPU time of every launch of one decoded token, or of one prefilled chunk, by NVIDIA's Nsight Compute.

    python benchmarks/step_gpu_time.py [--layers 12] [--depth 4096] [--batch 1] [--chunk N] [--recipe q2] \
        [--results FILE]

Needs `ncu` on the PATH (or in $NCU). Clocks are free and caches as the launches before leave them. With
`--chunk` that many tokens are prefilled after `--depth`, which begins from random rows.
"""

import argparse
import csv
import ctypes
import json
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
from device import device
from nsight import UNITS, profile, value

from ds4mlx.bench.synth import config_like, synth_model
from ds4mlx.bench.whole_model import synthetic_state

METRIC = "gpu__time_duration.sum"


def main() -> None:
    """Profile this file's step, and print what each kind of launch took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--depth", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--recipe", default="q2")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments)
        return
    rows = kinds(profiled(sys.argv[1:]))
    for row in rows:
        print(f"{row['us']:9.1f} us {row['launches']:4d} x {row['us_each']:8.2f}  {row['kernel']}")
    asked = {k: v for k, v in vars(arguments).items() if k not in ("run", "results")}
    total = {
        "us": round(sum(r["us"] for r in rows), 1),
        "launches": sum(r["launches"] for r in rows),
    }
    print(json.dumps(total))
    if arguments.results:
        found = {"device": device(), **asked, **total, "kernels": rows}
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")


def profiled(options: list[str]) -> str:
    """Nsight Compute's table of the launches that `run` asks for."""
    wanted = [
        "--profile-from-start",
        "off",
        "--cache-control",
        "none",
        "--csv",
        "--metrics",
        METRIC,
    ]
    return profile(wanted, __file__, ["--run", *options], {"MLX_USE_CUDA_GRAPHS": "0"})


def kinds(text: str) -> list[dict]:
    """A row for each kernel and size of its grid, the longest in all first."""
    times = defaultdict(list)
    for row in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        if row["Metric Unit"] in UNITS:
            name = row["Kernel Name"].partition("(")[0].removeprefix("custom_kernel_")
            times[f"{name} {row['Grid Size']}"].append(
                1e6 * value(row["Metric Value"], row["Metric Unit"])
            )
    rows = [
        {
            "kernel": name,
            "launches": len(each),
            "us": round(sum(each), 1),
            "us_each": round(sum(each) / len(each), 2),
        }
        for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def run(asked: argparse.Namespace) -> None:
    """What is profiled, once everything is compiled."""
    model = synth_model(config_like("flash", asked.layers), asked.recipe)
    states = [synthetic_state(model, asked.depth) for _ in range(asked.batch)]
    runtime = cuda_runtime()
    for turn in range(3):
        mx.synchronize()
        if turn == 2:
            runtime.cudaProfilerStart()
        if asked.chunk:
            mx.eval(model.streams(mx.ones((1, asked.chunk), mx.int32), states[0])[:, -1:])
        else:
            mx.eval(mx.argmax(model.step(mx.ones((asked.batch,), mx.int32), states), axis=-1))
        mx.synchronize()
    runtime.cudaProfilerStop()


def cuda_runtime() -> ctypes.CDLL:
    """The runtime that NVIDIA's packages have."""
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(root).glob("**/libcudart.so*"):
            return ctypes.CDLL(str(path))
    sys.exit("NVIDIA's CUDA runtime is not installed")


if __name__ == "__main__":
    main()
