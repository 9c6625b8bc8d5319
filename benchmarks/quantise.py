"""Speed of the quantisers, and the time that V4-Flash's routed experts would take.

Weights are as in the official checkpoint: random FP4 codes with one scale per 32, in the shapes of
Flash's experts (gate and up 2048 x 4096, down 4096 x 2048).

    python benchmarks/quantise.py [--experts N] [--rows N] [--results FILE]
"""

import argparse
import json
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from device import device

from ds4mlx.config import ModelConfig
from ds4mlx.convert.quantise import on_device, quantise
from ds4mlx.convert.recipes import LATE

RECIPES = {"q2": 0, "q2-q4": LATE, "q4": 43}


def main() -> None:
    """Run the benchmark and keep its numbers."""
    arguments = parse()
    rates = {
        f"{format}{'' if steered else ' without importance'}": rate(
            format, shape, steered, arguments.rows or shape[0], arguments.experts
        )
        for format, shape in SHAPES.items()
        for steered in (True, False)
    }
    result = {
        "device": device(),
        "million_weights_per_second": {name: round(each / 1e6, 2) for name, each in rates.items()},
        "peak_device_bytes": mx.get_peak_memory(),
        "projected_minutes": {name: projection(rates, late) for name, late in RECIPES.items()},
    }
    print(json.dumps(result, indent=1))
    if arguments.results:
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=8, help="matrices of each kind")
    parser.add_argument("--rows", type=int, help="only so many rows of each, for slow devices")
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


def rate(format: str, shape: tuple[int, int], steered: bool, rows: int, experts: int) -> float:
    """Weights per second, from packed FP4 in host memory to planes in host memory."""
    planes = fp4(rows, shape[1])
    columns = RNG.random(shape[1], np.float32) if steered else None
    quantise(on_device("mxfp4", planes), format, columns)  # compiles
    begun = time.perf_counter()
    for _ in range(experts):
        quantise(on_device("mxfp4", planes), format, columns)
    return experts * rows * shape[1] / (time.perf_counter() - begun)


def fp4(rows: int, columns: int) -> dict[str, np.ndarray]:
    """Planes of a random matrix: normal values as FP4 would hold them."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = RNG.standard_normal((rows, columns)) * 2
    codes = np.abs(np.abs(values)[..., None] - levels).argmin(-1) + 8 * (values < 0)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    scales = RNG.integers(118, 122, (rows, columns // 32), np.uint8)
    return {"weight": packed.view(np.uint32), "scales": scales}


def projection(rates: dict[str, float], late: int) -> float:
    """Minutes for all routed weights of Flash's main layers, `late` of them in Q4_K."""
    config = ModelConfig()
    matrix = config.n_routed_experts * config.hidden_size * config.moe_intermediate_size
    early = config.num_hidden_layers - late
    seconds = early * matrix * (2 / rates["iq2_xxs"] + 1 / rates["q2_k"])
    return round((seconds + late * matrix * 3 / rates["q4_k"]) / 60, 1)


RNG = np.random.default_rng(0)
SHAPES = {"iq2_xxs": (2048, 4096), "q2_k": (4096, 2048), "q4_k": (2048, 4096)}

if __name__ == "__main__":
    main()
