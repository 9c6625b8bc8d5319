"""Decoding by launches at Flash's sizes, random weights: the host's time to build and submit a step.

    python benchmarks/decode_step.py [--layers N] [--depths N,...] [--recipe q2] [--batch N,...]

States begin from random rows. A step is submitted before the tokens of the one before are read; medians.
"""

import argparse
import statistics
import time
from itertools import pairwise

import mlx.core as mx
from device import device
from shapes import numbers

from ds4mlx.bench.synth import RECIPES, config_like, synth_model
from ds4mlx.bench.whole_model import synthetic_state
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.submission import submit_by_number

WARM, STEPS = 10, 56


def medians(model: Model, states: list[DecodeState]) -> dict[str, float]:
    """Milliseconds of a step, and of its parts: building, submitting, waiting for the one before."""
    token, rows = mx.ones((len(states),), mx.int32), []
    for _ in range(WARM + STEPS):
        before, times = token, [time.perf_counter()]
        token = mx.argmax(model.step(token, states), axis=-1)
        times.append(time.perf_counter())
        mx.async_eval(token)
        times.append(time.perf_counter())
        mx.eval(before)
        times.append(time.perf_counter())
        rows.append([1000 * (b - a) for a, b in pairwise(times)])
    build, submit, wait = (statistics.median(part) for part in zip(*rows[WARM:], strict=True))
    total = statistics.median(sum(row) for row in rows[WARM:])
    return {"build": build, "submit": submit, "wait": wait, "total": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, help="only the first so many")
    parser.add_argument("--depths", type=numbers, default=[2048])
    parser.add_argument("--recipe", choices=RECIPES, default="q2")
    parser.add_argument("--batch", type=numbers, default=[1])
    arguments = parser.parse_args()
    submit_by_number()
    model = synth_model(config_like("flash", arguments.layers), arguments.recipe)
    print(device())
    for depth in arguments.depths:
        for batch in arguments.batch:
            states = [synthetic_state(model, depth) for _ in range(batch)]
            ms = medians(model, states)
            parts = ", ".join(f"{name} {value:.2f}" for name, value in ms.items())
            rate = 1000 * batch / ms["total"]
            print(f"depth {depth}, {batch} sequences: {rate:.1f} tokens/s; ms: {parts}", flush=True)
            del states
            mx.clear_cache()


if __name__ == "__main__":
    main()
