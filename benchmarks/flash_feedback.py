"""Rounding with error feedback at the shapes of V4-Flash: time, memory, and what is gained.

Weights are random FP4, as in the official checkpoint; inputs have eigenvalues that fall like 1/n and
a few columns of much energy. One matrix of 2,048 x 4,096 after another is rounded to IQ2_XXS with one
layer's moments, and beside it by importance. The projection is for gate and up of all experts.

    python benchmarks/flash_feedback.py [--matrices N] [--rows N] [--columns N] [--results FILE]
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from device import device
from quantise import fp4

from ds4mlx.config import ModelConfig
from ds4mlx.convert.feedback import Moment
from ds4mlx.convert.quantise import on_device, quantise
from ds4mlx.convert.quantise_fed import quantise_fed

TOKENS, OUTLIERS = 16_384, 12


def main() -> None:
    """Run the benchmark and keep its numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrices", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    sums = realistic(arguments.columns)
    factor_seconds, moment = timed(lambda: Moment.of(sums))
    diagonal = np.diag(sums).copy()
    planes = [fp4(arguments.rows, arguments.columns) for _ in range(arguments.matrices)]
    quantise_fed(on_device("mxfp4", planes[0]), "iq2_xxs", moment)  # compiles
    mx.reset_peak_memory()
    fed_seconds, fed = timed(lambda: [rounded(each, moment) for each in planes])
    peak = mx.get_peak_memory()
    plain_seconds, plain = timed(lambda: [rounded(each, diagonal) for each in planes])
    errors = [
        weighted_error(each, got, moment)
        for got_by in (fed, plain)
        for each, got in zip(planes, got_by, strict=True)
    ]
    half = len(planes)
    config = ModelConfig()
    matrices = 2 * config.n_routed_experts
    layer = factor_seconds + matrices * fed_seconds / half
    result = {
        "device": device(),
        "shape": [arguments.rows, arguments.columns],
        "seconds": {
            "factors of a layer": round(factor_seconds, 3),
            "a matrix with feedback": round(fed_seconds / half, 4),
            "a matrix by importance": round(plain_seconds / half, 4),
            "gate and up of a layer": round(layer, 1),
        },
        "projected_minutes_gate_and_up": round(config.num_hidden_layers * layer / 60, 1),
        "peak_device_bytes": peak,
        "error_in_the_outputs": {
            "with feedback": round(float(np.mean(errors[:half])), 5),
            "by importance": round(float(np.mean(errors[half:])), 5),
        },
    }
    print(json.dumps(result, indent=1))
    if arguments.results:
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")


def realistic(columns: int) -> np.ndarray:
    """Sums of x x^T over TOKENS inputs, float32 (columns, columns)."""
    rng = np.random.default_rng(1)
    mix = mx.array(rng.standard_normal((columns, columns), np.float32))
    fall = mx.rsqrt(mx.arange(1, columns + 1).astype(mx.float32))[:, None]
    sizes = np.ones(columns, np.float32)
    sizes[rng.choice(columns, OUTLIERS, replace=False)] = 8
    total = mx.zeros((columns, columns))
    for _ in range(TOKENS // columns):
        x = (mx.array(rng.standard_normal((columns, columns), np.float32)) * fall.T) @ mix
        x = x * mx.array(sizes)
        total = total + x.T @ x
        mx.eval(total)
    return np.array(total)


def timed(work: Callable) -> tuple[float, object]:
    """Seconds that the work took, and what it gave."""
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def rounded(planes: dict[str, np.ndarray], by: Moment | np.ndarray) -> mx.array:
    """What is stored, from packed FP4 in host memory, with moments or importances."""
    values = on_device("mxfp4", planes)
    quantised = quantise_fed if isinstance(by, Moment) else quantise
    return on_device("iq2_xxs", quantised(values, "iq2_xxs", by)[0])


def weighted_error(planes: dict[str, np.ndarray], got: mx.array, moment: Moment) -> float:
    """Mean square of the outputs' error relative to the outputs, damping included."""
    values = on_device("mxfp4", planes)
    gap = got - values
    return float(((gap @ moment.h) * gap).sum() / ((values @ moment.h) * values).sum())


if __name__ == "__main__":
    main()
