"""Steps of LoRA training at Flash's sizes, random weights: seconds and peak memory.

    python benchmarks/lora_step.py --results FILE [--layers 4] [--tokens 512] [--routed] [--small]

Adapters of attention and of the shared expert (with --routed also of the routed experts) in bfloat16
activations, over weights that stay as stored; Adam; the same random tokens in every step, so that
their loss has to fall. The first step also compiles kernels; seconds are the median of the others.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from device import device
from mlx.utils import tree_flatten
from shapes import shapes

from ds4mlx import Model
from ds4mlx.bench.synth import RECIPES, synth_model
from ds4mlx.engine.adapters import add_lora


def loss(model: Model, ids: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()


def measured(model: Model, ids: mx.array, steps: int) -> list[dict[str, float]]:
    """Of each step its seconds, the loss before it, and the most bytes since it began."""
    optimizer, rows = optim.Adam(1e-4), []
    gradients_of = nn.value_and_grad(model, loss)
    for number in range(steps):
        mx.clear_cache()
        mx.reset_peak_memory()
        began = time.perf_counter()
        value, gradients = gradients_of(model, ids)
        optimizer.update(model, gradients)
        mx.eval(value, model.trainable_parameters(), optimizer.state)
        seconds = time.perf_counter() - began
        row = {"seconds": seconds, "loss": value.item(), "peak_bytes": mx.get_peak_memory()}
        print(f"step {number}: {row}", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--recipe", choices=RECIPES, default="q2")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--routed", action="store_true", help="adapt the routed experts too")
    parser.add_argument("--small", action="store_true", help="the embedded model's shapes: a trial")
    asked = parser.parse_args()
    config, name = shapes(asked.layers, asked.small)
    model = synth_model(config, asked.recipe)
    weights = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
    add_lora(model, asked.rank, routed=asked.routed)
    model.train()
    ids = mx.random.randint(0, config.vocab_size, (1, asked.tokens + 1), key=mx.random.key(1))
    rows = measured(model, ids, asked.steps)
    learnt = dict(tree_flatten(model.trainable_parameters()))
    report = {
        "device": device(),
        "shapes": name,
        "recipe": asked.recipe,
        "tokens": asked.tokens,
        "rank": asked.rank,
        "adapted": "attention, shared expert" + (", routed experts" if asked.routed else ""),
        "trained_parameters": sum(a.size for a in learnt.values()),
        "weight_bytes": weights,
        "first_seconds": rows[0]["seconds"],
        "seconds": statistics.median(row["seconds"] for row in rows[1:] or rows),
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "steps": rows,
    }
    asked.results.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in report if key != "steps"}, indent=1))


if __name__ == "__main__":
    main()
