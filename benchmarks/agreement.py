"""How far the logits of the reference checkpoint are from the official computation, on this device.

python benchmarks/agreement.py [--results FILE]
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))

import make_checkpoint
import reference
from device import device

from ds4mlx import load
from ds4mlx.convert import convert
from ds4mlx.state.rounding import Rounding

SEQUENCE = "s129"
# What the references call them.
MODES: dict[Rounding, str] = {"none": "exact", "official": "kvsim"}


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint.make(f"{scratch}/official", 7, "tiny")
        convert(f"{scratch}/official", f"{scratch}/converted", progress=False)
        rows = [row for dtype in ("float32", "bfloat16") for row in compare(scratch, dtype)]
    result = {"device": device(), "mlx": version("mlx"), "rows": rows}
    print(f"{result['device']}, MLX {result['mlx']}")
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.results:
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")


def compare(scratch: str, dtype: str) -> list[dict]:
    """One row for each rounding and way of feeding the tokens."""
    found, stored = [], reference.arrays()
    ids = stored[f"{SEQUENCE}/ids"]
    for rounding, mode in MODES.items():
        model, _ = load(f"{scratch}/converted", getattr(mx, dtype), rounding)
        want = stored[f"{SEQUENCE}/{mode}/logits"].astype(np.float64)
        for way, lengths in (("prefill", []), ("decode", [1] * len(ids))):
            got = reference.run_chunks(model, ids, lengths)
            found.append(
                {
                    "dtype": dtype,
                    "rounding": rounding,
                    "way": way,
                    "max_difference": float(f"{np.abs(got - want).max():.3g}"),
                    "mean_kl": float(f"{reference.kl(want, got).mean():.3g}"),
                    "top1": round(float((got.argmax(-1) == want.argmax(-1)).mean()), 4),
                }
            )
    return found


if __name__ == "__main__":
    main()
