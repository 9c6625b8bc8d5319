"""All layers of Flash with random weights on one large GPU: speed, memory, and where a token's time goes.

    python benchmarks/full_model.py [--recipe q2] [--layers N] [--results FILE]

Makes the model in memory once, prefills and decodes it through the kernels at several depths, then the same
through plain operations (fewer depths: their prefill is far slower). The profile waits after every part
of a decoded token, so that its sum is more than a token takes; it says what the shares are. The norm before a sublayer counts with the
hyper-connection, the sum of the experts with what follows it.
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from device import device

from ds4mlx.bench.synth import config_like, synth_model
from ds4mlx.bench.whole_model import WARM, Asked, bench, synthetic_state
from ds4mlx.custom_kernels import dispatch
from ds4mlx.model.batch import Span
from ds4mlx.model.model import Model
from ds4mlx.model.taps import Listener, listening

GENERATED, DEPTHS = 16, (2048, 32768)
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
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    config, begun = config_like("flash", arguments.layers), time.perf_counter()
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

    for way, depths in (("kernels", (2048, 8192)), ("plain", (512,))):
        with dispatch.kernels(way == "kernels"):
            keep(f"decode_{way}", rows(model, DEPTHS, "synthetic"))
            keep(f"profile_{way}", {depth: profile(model, depth) for depth in DEPTHS})
            keep(f"prefill_{way}", rows(model, depths, "real"))


def rows(model: Model, depths: tuple[int, ...], fill) -> list[dict]:
    """Tokens a second, memory and the host's share at some depths."""
    asked = Asked(GENERATED, fill, target="cuda" if dispatch.in_use() else None)
    return [asdict(row) for row in bench(model, depths, asked, print)]


def profile(model: Model, depth: int) -> dict[str, float]:
    """Milliseconds of a decoded token by part, waiting after each; the rest is the head and the embedding."""
    cache, token = synthetic_state(model, depth), mx.array([[1]])
    clock = Clock()
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
