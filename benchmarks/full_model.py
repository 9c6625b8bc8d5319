"""All layers of Flash with random weights on one large GPU: speed, memory, and where a token's time goes.

    python benchmarks/full_model.py [--recipe q2] [--layers N] [--prompts N,...] [--deep N,...] \
        [--batches N,...] [--profile] [--plain] [--results FILE]

Makes the model in memory once. Each of `--prompts` is prefilled, and decoded after; at each of `--deep`,
and for each of `--batches` sequences at 4,096, decoding begins from random rows. `--plain`: the first prompt
once more through plain operations. `--profile` waits after every part of a decoded token, so that its sum
is more than a token takes; it says what the shares are. The norm before a sublayer counts with the
hyper-connection, the sum of the experts with what follows it. Figures are kept as they come.
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from device import device
from shapes import numbers

from ds4mlx.bench.synth import config_like, synth_model
from ds4mlx.bench.whole_model import WARM, Asked, Fill, bench, synthetic_state
from ds4mlx.custom_kernels import dispatch
from ds4mlx.model.batch import Span
from ds4mlx.model.model import Model
from ds4mlx.model.taps import Listener, listening
from ds4mlx.submission import submit_by_number

GENERATED, BATCHED = 64, 4096  # steps that are timed; the depth of several sequences
# By the end of its name, what a quantity is the last of; what is made of it later counts elsewhere.
PARTS = {
    "hc_attn.comb": "hyper-connections, before",
    "hc_attn.post": "hyper-connections, before",
    "hc_ffn.comb": "hyper-connections, before",
    "hc_ffn.post": "hyper-connections, before",
    "attn.in": "hyper-connections, before",
    "ffn.in": "hyper-connections, before",
    "attn.out": "attention",
    "router.weights": "router",
    "router.experts": "router",
    "ffn.experts.out": "routed experts",
    "shared_experts.out": "shared expert",
    "streams": "hyper-connections, after",
    "head.in": "hyper-connection of the head",
}


def main() -> None:
    """Measure, print as it comes, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="q2")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--prompts", type=numbers, default=[512, 2048, 8192, 32768, 65536])
    parser.add_argument("--deep", type=numbers, default=[100_000, 1_000_000])
    parser.add_argument("--batches", type=numbers, default=[4, 8])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    config, begun = config_like("flash", arguments.layers), time.perf_counter()
    submit_by_number()
    model = synth_model(config, arguments.recipe, mx.bfloat16)
    found: dict = {
        "device": device(),
        "layers": config.num_hidden_layers,
        "recipe": arguments.recipe,
        "made_in_s": round(time.perf_counter() - begun, 1),
        "weights_gb": round(mx.get_active_memory() / 1e9, 2),
    }

    def keep(name: str, part: object) -> None:
        found[name] = part
        print(name, json.dumps(part), flush=True)
        if arguments.results:
            arguments.results.write_text(json.dumps(found, indent=1) + "\n")

    with dispatch.kernels():
        for depth in arguments.prompts:
            keep(f"prefilled_{depth}", row(model, depth, "real"))
        for depth in arguments.deep:
            keep(f"from_random_rows_{depth}", row(model, depth, "synthetic"))
        for batch in arguments.batches:
            keep(f"{batch}_sequences", row(model, BATCHED, "synthetic", batch))
        if arguments.profile:
            keep("profile", profile(model, BATCHED))
    if arguments.plain:
        with dispatch.plain_operations():
            keep("plain", row(model, arguments.prompts[0], "real"))


def row(model: Model, depth: int, fill: Fill, batch: int = 1) -> dict:
    """Tokens a second, memory and the host's share at a depth."""
    asked = Asked(GENERATED, fill, batch, target="cuda" if dispatch.in_use() else None)
    return asdict(bench(model, (depth,), asked, print)[0])


def profile(model: Model, depth: int) -> dict[str, float]:
    """Milliseconds of a decoded token by part, waiting after each; the rest is the head and the embedding."""
    cache, token = synthetic_state(model, depth), mx.array([[1]])
    clock = Clock()
    begun = time.perf_counter()
    with listening(clock):
        for step in range(WARM + GENERATED):
            if step == WARM:
                clock.spent.clear()
                begun = time.perf_counter()
            token = mx.argmax(model.last_logits(token, cache), axis=-1)[None]
            mx.eval(token)
        total = 1000 * (time.perf_counter() - begun) / GENERATED
    parts = {name: round(1000 * seconds / GENERATED, 3) for name, seconds in clock.spent.items()}
    return {**parts, "rest": round(total - sum(parts.values()), 3), "token": round(total, 3)}


class Clock(Listener):
    """Evaluates what is named in PARTS as it comes, and adds up the seconds since the one before."""

    def __init__(self):
        self.spent: dict[str, float] = defaultdict(float)
        self._ends, self._last = tuple(PARTS), 0.0

    def wants(self, name: str) -> bool:
        """Every quantity that ends a part, and the embeddings, with which the first begins."""
        return name.endswith(self._ends) or name == "embed"

    def take(self, name: str, value: mx.array, span: Span | None) -> mx.array:
        """The same value, evaluated."""
        mx.eval(value)
        now = time.perf_counter()
        part = next((PARTS[end] for end in self._ends if name.endswith(end)), None)
        if part is not None:
            self.spent[part] += now - self._last
        self._last = now
        return value


if __name__ == "__main__":
    main()
