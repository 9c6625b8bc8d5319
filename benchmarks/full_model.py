"""All layers of Flash with random weights on one large GPU: speed, memory, and where a token's time goes.

    python benchmarks/full_model.py [--recipe q2] [--layers N] [--results FILE]

Makes the model in memory once, prefills and decodes it through the kernels at several depths, then the same
through plain operations (fewer depths: their prefill is far slower). The profile waits after every part
of a decoded token, so that its sum is more than a token takes; it says what the shares are.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from device import device

from ds4mlx.bench.synth import config_like, synth_model
from ds4mlx.bench.whole_model import WARM, bench, synthetic_state
from ds4mlx.custom_kernels import dispatch
from ds4mlx.model.attention import Attention
from ds4mlx.model.hyper import HyperConnection, HyperHead
from ds4mlx.model.model import Model
from ds4mlx.model.moe import RoutedExperts, Router, SharedExpert

GENERATED, DEPTHS = 16, (2048, 32768)
PARTS = {
    "attention": (Attention, "__call__"),
    "router": (Router, "__call__"),
    "routed experts": (RoutedExperts, "__call__"),
    "shared expert": (SharedExpert, "__call__"),
    "hyper-connections, before": (HyperConnection, "before"),
    "hyper-connections, after": (HyperConnection, "merge"),
    "hyper-connection of the head": (HyperHead, "__call__"),
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
    return [asdict(row) for row in bench(model, depths, GENERATED, fill, print)]


def profile(model: Model, depth: int) -> dict[str, float]:
    """Milliseconds of a decoded token by part, waiting after each; the rest is norms, head and embedding."""
    cache, token = synthetic_state(model, depth), mx.array([[1]])
    with timed_parts() as spent:
        for step in range(WARM + GENERATED):
            if step == WARM:
                spent.clear()
                begun = time.perf_counter()
            token = mx.argmax(model.last_logits(token, cache), axis=-1)[None]
            mx.eval(token)
        total = 1000 * (time.perf_counter() - begun) / GENERATED
    parts = {name: round(1000 * seconds / GENERATED, 3) for name, seconds in spent.items()}
    return {**parts, "rest": round(total - sum(parts.values()), 3), "token": round(total, 3)}


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Within the block every part is evaluated at once, and its seconds are added up."""
    spent: dict[str, float] = defaultdict(float)
    usual = {name: getattr(kind, method) for name, (kind, method) in PARTS.items()}

    def timed(name: str, call: Callable, *arguments):
        begun = time.perf_counter()
        out = call(*arguments)
        mx.eval(out)
        spent[name] += time.perf_counter() - begun
        return out

    def put(calls: dict[str, Callable]) -> None:
        for name, (kind, method) in PARTS.items():
            setattr(kind, method, calls[name])

    def wrapped(name: str) -> Callable:
        return lambda *arguments: timed(name, usual[name], *arguments)

    put({name: wrapped(name) for name in PARTS})
    try:
        yield spent
    finally:
        put(usual)


if __name__ == "__main__":
    main()
