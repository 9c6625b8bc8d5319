"""What bfloat16 costs the small model's next-token probabilities, decoded by launches and by plain operations.

Held-out text is decoded one token at a time: by the launches of a step, whose Metal text the CPU
executor runs where there is no GPU (some 0.6 s a token), and by the modules in plain operations.
Both are held against the same weights in float32.

    python decode_quality.py [--recipe official|q2] [--tokens N] [--results FILE]
"""

import argparse
import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import reference
from spoiling import on_metal
from tqdm import tqdm

from ds4mlx import load
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
            plain = reference.kl(want, decoded(half, ids))
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
    divergences: list[float] = []
    with through_launches():
        for n, row in enumerate(tqdm(rows(half, ids), total=len(ids), unit=" tokens"), 1):
            divergences.append(float(reference.kl(want[n - 1 : n], row)[0]))
            if n % KEPT_EVERY == 0 or n == len(ids):
                keep(arguments, summary(divergences, plain[:n]))


@contextlib.contextmanager
def through_launches() -> Iterator[None]:
    """Inside the block steps go through launches: a GPU's, or by the executor of Metal text."""
    on_gpu = mx.default_device() == mx.gpu
    with contextlib.nullcontext() if on_gpu else on_metal(), dispatch.kernels(), launches():
        yield


def decoded(model: Model, ids: np.ndarray) -> np.ndarray:
    """Logits (T, vocab) of one sequence, a token at a time."""
    return np.concatenate(list(rows(model, ids)))


def rows(model: Model, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Logits (1, vocab) after every token of one sequence."""
    state = model.make_cache()
    for token in ids:
        yield np.array(model.step(mx.array([int(token)]), [state]))


def summary(launched: list[float], plain: np.ndarray) -> dict:
    """Means of the KL divergences to float32, in nats, and how many times the plain one's is the launches'."""
    means = {"launches": float(np.mean(launched)), "plain": float(plain.mean())}
    found = {"tokens": len(launched), "ratio": round(means["launches"] / means["plain"], 3)}
    return found | {key: float(f"{mean:.3g}") for key, mean in means.items()}


def device() -> str:
    """The GPU's name, or the processor's."""
    if mx.default_device() == mx.gpu:
        return str(mx.device_info()["device_name"])
    return f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"


def keep(arguments: argparse.Namespace, row: dict) -> None:
    print(arguments.recipe, row, flush=True)
    if not arguments.results:
        return
    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    known |= {"device": device(), "mlx": version("mlx"), arguments.recipe: row}
    arguments.results.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
