"""What a chunk of a prompt takes beside weights and state, and how fast it is, by its length and depth.

    python benchmarks/prefill_scratch.py [--layers 12] [--chunks N,...] [--depths N,...] [--results FILE]

Layers of Flash with random weights at q2; before a depth the rows are random. The chunk is read twice, and
the second time counts: the most memory that was in use at any time in it, less what was in use before it. A
chunk takes as much of a model with more layers, of which only two halves are evaluated at a time.
"""

import argparse
import json
import time
from pathlib import Path

import mlx.core as mx
from device import device
from shapes import numbers

from ds4mlx.bench.synth import config_like, synth_model
from ds4mlx.bench.whole_model import synthetic_state
from ds4mlx.custom_kernels import dispatch
from ds4mlx.engine.prefill import prefill
from ds4mlx.model.model import Model


def main() -> None:
    """Measure, print as it comes, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--chunks", type=numbers, default=[512, 1024, 2048, 4096])
    parser.add_argument("--depths", type=numbers, default=[0, 8192, 65_536, 1_000_000])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    model = synth_model(config_like("flash", arguments.layers), "q2")
    found: dict = {"device": device(), "layers": arguments.layers, "rows": []}
    with dispatch.kernels():
        for depth in arguments.depths:
            for chunk in arguments.chunks:
                found["rows"].append(row(model, depth, chunk))
                print(json.dumps(found["rows"][-1]), flush=True)
                if arguments.results:
                    arguments.results.write_text(json.dumps(found, indent=1) + "\n")


def row(model: Model, depth: int, chunk: int) -> dict:
    """Gigabytes and milliseconds of a chunk that is read after `depth` tokens."""
    state, ids = synthetic_state(model, depth), [1 + i % 1000 for i in range(chunk)]
    held, begun, seconds = 0, 0.0, 0.0
    for _ in range(2):
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        held, begun = mx.get_active_memory(), time.perf_counter()
        prefill(model, ids, state, step=chunk + depth)
        seconds = time.perf_counter() - begun
    peak = mx.get_peak_memory()
    return {
        "depth": depth,
        "chunk": chunk,
        "scratch_gb": round((peak - held) / 1e9, 3),
        "ms": round(1000 * seconds, 1),
    }


if __name__ == "__main__":
    main()
