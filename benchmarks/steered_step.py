"""What steering costs: a decoded token and a prompt at Flash's sizes, random weights and directions.

    python benchmarks/steered_step.py --results FILE [--layers 4] [--tokens 2048] [--gen 64] [--small]

Decoding goes through launches; a steered block goes through its modules instead, all others stay. So
it is measured without steering, steered in one layer, in half of them and in all, at `ffn.out` and at
`streams`. Times are medians, of a step those of its tokens, after random rows of `--tokens` tokens.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from device import device
from shapes import shapes

from ds4mlx import Model, ModelConfig
from ds4mlx.bench.synth import RECIPES, synth_model
from ds4mlx.bench.whole_model import decode, prefilled, synthetic_state
from ds4mlx.research import Steering


def steerings(config: ModelConfig) -> Iterator[tuple[str, int, Steering | None]]:
    """Name, how many layers are steered, and how."""
    yield "none", 0, None
    rng, layers = np.random.default_rng(5), config.num_hidden_layers
    every = {n: rng.normal(size=config.hidden_size) for n in range(layers)}
    for site in ("ffn.out", "streams"):
        for count in sorted({1, layers // 2, layers}):
            chosen = {n: every[n] for n in range(layers - count, layers)}
            yield f"project at {site}", count, Steering("project", site, chosen)


def measured(model: Model, how: Steering | None, tokens: int, gen: int) -> dict[str, float]:
    """Milliseconds of a step, the host's share of them, and tokens a second of a prompt."""
    with contextlib.nullcontext() if how is None else model.steer(how):
        times, hosts, _ = decode(model, [synthetic_state(model, tokens)], gen)
        _, rate, _ = prefilled(model, tokens, 1)
    return {
        "decode_ms": round(1000 * statistics.median(times), 3),
        "host_ms": round(1000 * statistics.median(hosts), 3),
        "prefill_tokens_per_s": round(rate, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--gen", type=int, default=64, help="steps that are timed")
    parser.add_argument("--recipe", choices=RECIPES, default="q2")
    parser.add_argument("--small", action="store_true", help="the embedded model's shapes: a trial")
    asked = parser.parse_args()
    config, sizes = shapes(asked.layers, asked.small)
    model, rows = synth_model(config, asked.recipe), []
    for name, count, how in steerings(config):
        row = {"steering": name, "layers": count}
        rows.append(row | measured(model, how, asked.tokens, asked.gen))
        print(rows[-1], flush=True)
    report = {
        "device": device(),
        "shapes": sizes,
        "recipe": asked.recipe,
        "tokens": asked.tokens,
        "gen": asked.gen,
        "rows": rows,
    }
    asked.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
