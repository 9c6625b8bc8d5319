"""Rounding with error feedback at the shapes of V4-Flash: what is gained, time, and memory.

Weights are random FP4, as in the official checkpoint. Inputs have eigenvalues that fall like 1/n and a
few columns of much energy; the moments are those of a sample of them, and the error of the outputs is
taken over that sample and over all inputs there can be. A few matrices of gate (2,048 x 4,096) are
rounded to IQ2_XXS with the moments and by importance, and of down (4,096 x 2,048) to Q2_K by
importance, as `q2` does. Then a layer's 768 matrices are quantised, as many as there is time for. Every
figure is kept as it comes.

    python benchmarks/flash_feedback.py [--seconds N] [--rows N] [--columns N] [--tokens N] [--results FILE]
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np
from device import device
from quantise import fp4

from ds4mlx.config import ModelConfig
from ds4mlx.convert.feedback import DAMPING, Moment
from ds4mlx.convert.quantise import on_device, quantise
from ds4mlx.convert.quantise_fed import quantise_fed
from ds4mlx.precision import keep_float32

OUTLIERS = 12
DISTINCT, TOGETHER = 3, 4  # matrices whose errors are measured; that are rounded at once
Planes = dict[str, np.ndarray]
Found = TypeVar("Found")


def main() -> None:
    """Run the benchmark and keep its numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="when the layer is broken off")
    parser.add_argument("--rows", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--columns", type=int, default=4096, help="the same")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="inputs of the moments")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    keep_float32()
    Bench(arguments).run()


class Bench:
    """The figures so far, and what they are taken on."""

    def __init__(self, arguments: argparse.Namespace):
        self.ends, self.path = time.perf_counter() + arguments.seconds, arguments.results
        self.gate = arguments.rows, arguments.columns
        self.figures: dict = {
            "device": device(),
            "shape": list(self.gate),
            "tokens": arguments.tokens,
        }
        self.every, self.sums = realistic(arguments.columns, arguments.tokens)
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """All of it, the most wanted first."""
        seconds, moment = timed(lambda: Moment.of(self.sums))
        self.seconds["factors of a layer"] = seconds
        self.keep()
        gates = [made_up(*self.gate) for _ in range(DISTINCT)]
        downs = [made_up(*self.gate[::-1]) for _ in range(DISTINCT)]
        self.first_matrices(gates, downs, moment)
        self.together(gates, moment)
        self.layer(gates, downs, moment)
        print(json.dumps(self.figures, indent=1))

    def first_matrices(self, gates: list[Planes], downs: list[Planes], moment: Moment) -> None:
        """Errors with feedback and without, and how long a matrix takes."""
        by_gate, by_down = (np.diag(self.sums).copy(), np.ones(self.gate[0], np.float32))
        ways: dict[str, tuple[list[Planes], Callable[[Planes], Planes]]] = {
            "gate with feedback": (gates, lambda each: fed(each, moment)),
            "gate by importance": (gates, lambda each: steered(each, "iq2_xxs", by_gate)),
            "down by importance": (downs, lambda each: steered(each, "q2_k", by_down)),
        }
        for name, (matrices, quantised) in ways.items():
            compiling = timed(partial(quantised, matrices[0]))[0]
            each = [timed(partial(quantised, matrix)) for matrix in matrices]
            self.seconds[f"{name}, the first"] = compiling
            self.seconds[name] = float(np.mean([seconds for seconds, _ in each]))
            if matrices is gates:
                self.errors(name, gates, [found for _, found in each], moment)
            self.keep()

    def together(self, gates: list[Planes], moment: Moment) -> None:
        """How long a matrix takes where TOGETHER share the launches."""
        picked = [gates[n % DISTINCT] for n in range(TOGETHER)]
        stack = {plane: np.concatenate([each[plane] for each in picked]) for plane in gates[0]}
        fed(stack, moment)  # compiles
        took = timed(partial(fed, stack, moment))[0]
        self.seconds[f"gate with feedback, {TOGETHER} at once"] = took / TOGETHER
        self.keep()

    def errors(self, name: str, gates: list[Planes], found: list[Planes], moment: Moment) -> None:
        """The mean square error of the outputs, relative to them."""
        sample = moment.h - DAMPING * mx.eye(self.gate[1])
        for what, h in (("the sample", sample), ("all inputs", mx.array(self.every))):
            each = [lost(*pair, h) for pair in zip(gates, found, strict=True)]
            kept = self.figures.setdefault(f"error of the outputs over {what}", {})
            kept[name] = float(f"{np.mean(each):.5g}")

    def layer(self, gates: list[Planes], downs: list[Planes], moment: Moment) -> None:
        """Quantise a layer's matrices, expert by expert, until the time is up; then project."""
        experts, layers = ModelConfig().n_routed_experts, ModelConfig().num_hidden_layers
        down = np.ones(self.gate[0], np.float32)
        mx.reset_peak_memory()
        begun, done = time.perf_counter(), 0
        while done < experts and (not done or time.perf_counter() < self.ends):
            for _ in ("gate", "up"):
                fed(gates[done % DISTINCT], moment)
            steered(downs[done % DISTINCT], "q2_k", down)
            done += 1
            took = time.perf_counter() - begun
            whole = self.seconds["factors of a layer"] + took / done * experts
            self.figures["a layer"] = {
                "experts done": done,
                "of": experts,
                "seconds": round(took, 2),
                "seconds of all, with its factors": round(whole, 1),
            }
            self.figures["projected minutes of all layers"] = round(layers * whole / 60, 1)
            self.keep()

    def keep(self) -> None:
        """Write what is known."""
        self.figures["seconds"] = {name: round(each, 4) for name, each in self.seconds.items()}
        self.figures["peak bytes"] = {
            "device": mx.get_peak_memory(),
            "host, with what the benchmark makes up": peak_of_the_process(),
        }
        if self.path:
            self.path.write_text(json.dumps(self.figures, indent=1) + "\n")


def made_up(rows: int, columns: int) -> Planes:
    """Planes of a random matrix, some rows at a time."""
    pieces = [fp4(min(128, rows - start), columns) for start in range(0, rows, 128)]
    return {plane: np.concatenate([piece[plane] for piece in pieces]) for plane in pieces[0]}


def realistic(columns: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Second moments of the inputs there can be, and sums of x x^T over a sample; (columns, columns).

    The moments are scaled to a mean diagonal of 1.
    """
    rng = np.random.default_rng(1)
    fall = mx.rsqrt(mx.arange(1, columns + 1).astype(mx.float32))[:, None]
    sizes = np.ones(columns, np.float32)
    sizes[rng.choice(columns, OUTLIERS, replace=False)] = 8
    mix = mx.array(rng.standard_normal((columns, columns), np.float32)) * fall * mx.array(sizes)
    every, total = mix.T @ mix, mx.zeros((columns, columns))
    for start in range(0, tokens, columns):
        rows = min(columns, tokens - start)
        x = mx.array(rng.standard_normal((rows, columns), np.float32)) @ mix
        total = total + x.T @ x
        mx.eval(total)
    return np.array(every / mx.diag(every).mean()), np.array(total)


def timed(work: Callable[[], Found]) -> tuple[float, Found]:
    """Seconds that the work took, and what it gave."""
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def fed(planes: Planes, moment: Moment) -> Planes:
    """Packed FP4 in host memory to packed IQ2_XXS there."""
    return quantise_fed(on_device("mxfp4", planes), "iq2_xxs", moment)[0]


def steered(planes: Planes, format: str, importance: np.ndarray) -> Planes:
    """The same by importance (columns,)."""
    return quantise(on_device("mxfp4", planes), format, importance)[0]


def lost(planes: Planes, got: Planes, h: mx.array) -> float:
    """Mean square of the outputs' error relative to the outputs, for second moments h."""
    values = on_device("mxfp4", planes)
    gap = on_device("iq2_xxs", got) - values
    return float(((gap @ h) * gap).sum() / ((values @ h) * values).sum())


def peak_of_the_process() -> int:
    """Bytes of host memory held at the peak, on Linux."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
