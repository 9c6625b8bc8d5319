"""What a launch costs the host, by the arrays that it takes and makes: a chain of tiny ones on an NVIDIA GPU.

    python benchmarks/launch_cost.py [--rounds 2] [--results FILE]

Each chain is compiled and replayed, as a decoded token is, and every launch has weights of its own. A
pace is measured beside it, that of additions in Python, since a host's changes within seconds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from device import device

LAUNCHES, STEPS, SETTLING = 400, 60, 10
SHAPES = ((1, 1), (9, 1), (17, 1), (1, 3), (1, 5), (7, 2))  # arrays taken and made


def main() -> None:
    """Print what a launch of every shape costs, in rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    weights = [mx.full((1, 64), n, mx.float32) for n in range(LAUNCHES * 16)]
    mx.eval(weights)
    rows = []
    for _ in range(arguments.rounds):
        for takes, makes in SHAPES:
            built, submitted = replayed(chain(takes, makes, weights))
            rows.append(
                {
                    "inputs": takes,
                    "outputs": makes,
                    "build_us": round(built, 2),
                    "submit_us": round(submitted, 2),
                    "addition_ns": round(addition(), 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if arguments.results:
        found = {"device": device(), "launches": LAUNCHES, "rows": rows}
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")


def chain(takes: int, makes: int, weights: list[mx.array]) -> Callable[[mx.array], mx.array]:
    """Launches one after the other, each of which takes what the one before made, and weights."""
    kernel: Any = mx.fast.cuda_kernel(
        name=f"takes_{takes}_makes_{makes}",
        input_names=[f"i{n}" for n in range(takes)],
        output_names=[f"o{n}" for n in range(makes)],
        source="if (threadIdx.x == 0 && blockIdx.x == 0) o0[0] = i0[0];",
    )

    def step(x: mx.array) -> mx.array:
        for n in range(LAUNCHES):
            x = kernel(
                inputs=[x, *weights[n * 16 : n * 16 + takes - 1]],
                grid=(32, 1, 1),
                threadgroup=(32, 1, 1),
                output_shapes=[(1, 64)] * makes,
                output_dtypes=[mx.float32] * makes,
            )[0]
        return x

    return mx.compile(step)


def replayed(step: Callable[[mx.array], mx.array]) -> tuple[float, float]:
    """Microseconds of the host for a launch: to replay the graph, and to submit it."""
    x, built, submitted = mx.ones((1, 64)), [], []
    for number in range(STEPS):
        begun, before = time.perf_counter(), x
        x = step(x)
        made = time.perf_counter()
        mx.async_eval(x)
        ended = time.perf_counter()
        mx.eval(before)
        if number >= SETTLING:
            built.append(made - begun)
            submitted.append(ended - made)
    mx.eval(x)
    scale = 1e6 / LAUNCHES
    return scale * statistics.median(built), scale * statistics.median(submitted)


def addition() -> float:
    """Nanoseconds of one addition in Python."""
    begun, total = time.perf_counter(), 0
    for number in range(300_000):
        total += number
    return 1e9 * (time.perf_counter() - begun) / 300_000


if __name__ == "__main__":
    main()
