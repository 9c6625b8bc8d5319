"""What bfloat16 costs the small model's probabilities, decoded by the Metal text of the launches, on a CPU.

Held-out text is decoded one token at a time: by the launches of a step, which the executor runs as a
Mac would (some 0.6 s a token), and by plain operations. Both are held against the same weights in
float32. `benchmarks/kernel_model.py` asks a GPU the same.

    PYTHONPATH=..:../oracle python decode_quality.py [--recipe official|q2] [--tokens N] [--results FILE]
"""

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import reference
from spoiling import on_metal
from tqdm import tqdm

from ds4mlx import load
from ds4mlx.cli.doctor import processor
from ds4mlx.convert import convert
from ds4mlx.custom_kernels import dispatch
from ds4mlx.engine.default_model import EMBEDDED, default_model
from ds4mlx.evaluation.held_out import held_out_texts
from ds4mlx.model.fused.choice import launches
from ds4mlx.model.model import Model

# Tokens after which what is known so far is kept.
KEPT_EVERY = 100


def main() -> None:
    """Measure one recipe, and keep its row in the file of results."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        path = weights(arguments.recipe, Path(scratch) / "converted")
        exact, tokenizer = load(path, mx.float32)
        half, _ = load(path, mx.bfloat16)
        text = "\f".join(held_out_texts())
        ids = np.array(tokenizer.encode(text)[: arguments.tokens], np.int32)
        with dispatch.plain_operations():
            want = reference.run_chunks(exact, ids, [])
            plain = reference.kl(want, reference.run_chunks(half, ids, [1] * len(ids)))
        measure(arguments, half, ids, want, plain)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=("official", "q2"), default="official")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


def weights(recipe: str, into: Path) -> Path:
    """The small model as it is shipped, or converted."""
    if recipe == "official":
        return default_model()
    convert(EMBEDDED, into, recipe=recipe, progress=False)
    return into


def measure(arguments: argparse.Namespace, half: Model, ids: np.ndarray, want, plain) -> None:
    """Decode by launches, and keep the means so far every now and then."""
    state, found = half.make_cache(), np.zeros(0)
    with on_metal(), dispatch.kernels(), launches():
        for begin in tqdm(range(0, len(ids), KEPT_EVERY), unit=f" times {KEPT_EVERY} tokens"):
            piece = ids[begin : begin + KEPT_EVERY]
            got = reference.run_chunks(half, piece, [1] * len(piece), state)
            found = np.append(found, reference.kl(want[begin : begin + len(piece)], got))
            keep(arguments, summary(found, plain[: len(found)]))


def summary(launched: np.ndarray, plain: np.ndarray) -> dict:
    """Means of the KL divergences to float32, in nats, and how many times the plain one's is the launches'."""
    means = {"launches": float(launched.mean()), "plain": float(plain.mean())}
    found = {"tokens": len(launched), "ratio": round(means["launches"] / means["plain"], 3)}
    return found | {key: float(f"{mean:.3g}") for key, mean in means.items()}


def keep(arguments: argparse.Namespace, row: dict) -> None:
    print(arguments.recipe, row, flush=True)
    if not arguments.results:
        return
    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    device = f"{os.cpu_count()} cores of {processor()}"
    known |= {"device": device, "mlx": version("mlx"), arguments.recipe: row}
    arguments.results.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
