"""Rounding with error feedback at the shapes of V4-Flash: what is gained, time, and memory.

Weights are random FP4, as in the official checkpoint. Inputs have eigenvalues that fall like 1/n and a
few columns of much energy; the moments are those of a sample of them, and the error of the outputs is
taken over that sample and over all inputs there can be. Matrices of gate (2,048 x 4,096) are rounded
to IQ2_XXS with the moments, a stack at a time as a conversion does it, and by importance; matrices of
down (4,096 x 2,048) to Q2_K by importance, as `q2` does. Times are from packed FP4 in host memory to
planes there. A layer has 512 matrices of gate and up and 256 of down: how much of it was measured is
said, and the rest is scaled. Every figure is said and kept as it comes, and the program ends by itself.

    python benchmarks/flash_feedback.py [--seconds N] [--stack N] [--stacks N] [--rows N] [--columns N]
                                        [--tokens N] [--results FILE]
"""

import argparse
import faulthandler
import json
import resource
import sys
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
from ds4mlx.convert.encoder import stacked
from ds4mlx.convert.feedback import DAMPING, Moment
from ds4mlx.convert.quantise import on_device, quantise
from ds4mlx.convert.quantise_fed import quantise_stack
from ds4mlx.precision import keep_float32
from ds4mlx.weights.inventory import Entry

OUTLIERS = 12
DISTINCT = 3  # matrices that differ, and whose errors are measured
Planes = dict[str, np.ndarray]
Found = TypeVar("Found")


def main() -> None:
    """Run the benchmark and keep its numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240, help="no later than this it ends")
    parser.add_argument("--stack", type=int, help="matrices rounded together, as a conversion does")
    parser.add_argument("--stacks", type=int, default=4, help="so many are timed, if there is time")
    parser.add_argument("--rows", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--columns", type=int, default=4096, help="the same")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="inputs of the moments")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.seconds, exit=True)  # says where it was
    keep_float32()
    Bench(arguments).run()
    faulthandler.cancel_dump_traceback_later()


class Bench:
    """The figures so far, and what they are taken on."""

    def __init__(self, arguments: argparse.Namespace):
        self.begun, self.limit = time.perf_counter(), arguments.seconds
        self.path = arguments.results
        self.gate, self.stacks = (arguments.rows, arguments.columns), arguments.stacks
        self.together = arguments.stack or stacked(Entry("w1", (1, *self.gate), "experts"))
        self.figures: dict = {
            "device": device(),
            "shape": list(self.gate),
            "tokens": arguments.tokens,
            "matrices of a stack": self.together,
        }
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.every, self.sums = self.taking(
            "inputs made up", lambda: realistic(arguments.columns, arguments.tokens)
        )

    def taking(self, name: str, work: Callable[[], Found]) -> Found:
        """Do the work, and keep and say how many seconds it took."""
        mx.reset_peak_memory()
        begun = time.perf_counter()
        found = work()
        self.seconds[name] = round(time.perf_counter() - begun, 4)
        self.peaks[name] = mx.get_peak_memory()
        self.keep()
        elapsed = time.perf_counter() - self.begun
        print(f"{elapsed:7.1f} s: {name}, {self.seconds[name]:.3f} s", file=sys.stderr, flush=True)
        return found

    def run(self) -> None:
        """All of it, the most wanted first."""
        gates = [made_up(*self.gate) for _ in range(DISTINCT)]
        moment = self.taking("factors of a layer", lambda: Moment.of(self.sums))
        few = [{plane: rows[:32] for plane, rows in gates[0].items()}]
        self.taking("32 rows, the first launches", partial(fed, few, moment))
        self.taking("one matrix with feedback", partial(fed, gates[:1], moment))
        found = self.taking("gate with feedback, a few", partial(fed, gates, moment))
        self.errors("with feedback", gates, found, moment)
        by = np.diag(self.sums).copy()
        found = [steered(gates[0], "iq2_xxs", by)]  # the first launches
        found = self.taking(
            "gate by importance, as many", lambda: [steered(g, "iq2_xxs", by) for g in gates]
        )
        self.errors("by importance", gates, found, moment)
        self.down()
        self.layer(gates, moment)
        print(json.dumps(self.figures, indent=1))

    def errors(self, name: str, gates: list[Planes], found: list[Planes], moment: Moment) -> None:
        """The mean square error of the outputs, relative to them."""
        sample = moment.h - DAMPING * mx.eye(self.gate[1])
        for what, h in (("the sample", sample), ("all inputs", mx.array(self.every))):
            each = [lost(*pair, h) for pair in zip(gates, found, strict=True)]
            kept = self.figures.setdefault(f"error of the outputs over {what}", {})
            kept[name] = float(f"{np.mean(each):.5g}")
        self.keep()

    def down(self) -> None:
        """Matrices of down by importance, as they are where no expert has moments of its own."""
        downs = [made_up(*self.gate[::-1]) for _ in range(DISTINCT)]
        even = np.ones(self.gate[0], np.float32)
        steered(downs[0], "q2_k", even)  # the first launches
        name = "down by importance, as many"
        self.taking(name, lambda: [steered(each, "q2_k", even) for each in downs])

    def layer(self, gates: list[Planes], moment: Moment) -> None:
        """Stacks of gate and up while there is time for one more; then all layers are projected."""
        stack, took = [gates[n % DISTINCT] for n in range(self.together)], []
        expected = self.seconds["one matrix with feedback"] * self.together
        while len(took) < self.stacks and self.left() > 1.2 * expected + 1:
            self.taking(f"stack {len(took) + 1} of gate and up", partial(fed, stack, moment))
            expected = self.seconds[f"stack {len(took) + 1} of gate and up"]
            took.append(expected)
            self.project(float(np.mean(took[1:] or took)) / self.together, len(took))
        if not took:
            self.project(self.seconds["gate with feedback, a few"] / DISTINCT, 0)

    def left(self) -> float:
        """Seconds until the program ends itself."""
        return self.limit - (time.perf_counter() - self.begun)

    def project(self, each: float, stacks: int) -> None:
        """A layer and all layers, at so many seconds a matrix of gate and up."""
        experts, layers = ModelConfig().n_routed_experts, ModelConfig().num_hidden_layers
        down = self.seconds["down by importance, as many"] / DISTINCT
        whole = self.seconds["factors of a layer"] + experts * (2 * each + down)
        self.figures["a layer"] = {
            "matrices of gate and up measured": stacks * self.together,
            "of": 2 * experts,
            "seconds a matrix": {"gate and up": round(each, 4), "down": round(down, 4)},
            "seconds of all, with its factors": round(whole, 1),
        }
        self.figures["projected minutes of all layers"] = round(layers * whole / 60, 1)
        self.keep()
        minutes = self.figures["projected minutes of all layers"]
        print(f"          all layers: {minutes} minutes", file=sys.stderr, flush=True)

    def keep(self) -> None:
        """Write what is known."""
        self.figures["seconds"] = self.seconds
        self.figures["peak bytes of the device"] = self.peaks
        self.figures["peak bytes of the host, with what the benchmark makes up"] = (
            peak_of_the_process()
        )
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


def fed(matrices: list[Planes], moment: Moment) -> list[Planes]:
    """Packed FP4 in host memory to packed IQ2_XXS there, all matrices together."""
    stack = mx.stack([on_device("mxfp4", planes) for planes in matrices])
    return [planes for planes, _ in quantise_stack(stack, "iq2_xxs", moment)]


def steered(planes: Planes, format: str, importance: np.ndarray) -> Planes:
    """One matrix by importance (columns,)."""
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
