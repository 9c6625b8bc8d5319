"""Whole models through the kernels on this GPU, against the same through plain operations.

    MLX_ENABLE_TF32=0 python benchmarks/kernel_model.py [-m DIR --text FILE] [--results FILE]

First the logits in float32 without rounding: of a q2 file by ds4's own quantiser and of the reference
checkpoint, against the logits of llama.cpp and of the official code, and against plain operations on
the CPU. Then bfloat16 on a text: the mean KL divergence to float32 with kernels, without, and with 8-bit activations
(which only decoding a q2 or q4 model has).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "oracle")]
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import make_checkpoint
import mlx.core as mx
import numpy as np
import reference
import v4format
from device import device

from ds4mlx import load
from ds4mlx.convert import convert
from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.default_model import default_model

WINDOW = 256


def main() -> None:
    """Print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, help="model directory for the KL divergence")
    parser.add_argument("--text", type=Path, help="held-out text; default: the README")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if dialect.target() is None:
        sys.exit("kernels run on a GPU, and MLX has none here")
    found = {"device": device(), "logits": [], "kl": divergence(arguments)}
    with tempfile.TemporaryDirectory() as scratch:
        found["logits"] = [*q2_file(Path(scratch)), *checkpoint(Path(scratch))]
    print(json.dumps(found, indent=1))
    if arguments.results:
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")


def q2_file(scratch: Path) -> list[dict]:
    """IQ2_XXS, Q2_K and Q8_0: against llama.cpp."""
    convert(reference.DATA / "gguf" / "ds4-q2.gguf", scratch / "q2", progress=False)
    stored = v4format.read_safetensors(reference.DATA / "gguf" / "ds4-q2.logits.safetensors")
    ids, want = stored["tokens"][1], stored["logits"][1]
    return compare("ds4's q2, llama.cpp", scratch / "q2", ids, want)


def checkpoint(scratch: Path) -> list[dict]:
    """MXFP4 and MXFP8: against the official code."""
    make_checkpoint.make(str(scratch / "official"), 7, "tiny")
    convert(scratch / "official", scratch / "converted", progress=False)
    stored = reference.arrays()
    ids, want = stored["s129/ids"], stored["s129/exact/logits"]
    return compare("checkpoint, official code", scratch / "converted", ids, want)


def compare(name: str, path: Path, ids: np.ndarray, want: np.ndarray) -> list[dict]:
    """Largest differences of float32 logits, for a whole prompt and token by token."""
    model, _ = load(path, mx.float32, "none")
    reference.settle_ties(model)
    with dispatch.plain_operations():
        mx.set_default_device(mx.cpu)
        plain = reference.run_chunks(load(path, mx.float32, "none")[0], ids, [])
        mx.set_default_device(mx.gpu)
    rows = []
    for way, lengths in (("prefill", []), ("decode", [1] * len(ids))):
        got = reference.run_chunks(model, ids, lengths)
        rows.append(
            {
                "what": name,
                "way": way,
                "max_difference": float(np.abs(got - want).max()),
                "max_difference_to_plain_on_cpu": float(np.abs(got - plain).max()),
            }
        )
    return rows


def divergence(arguments: argparse.Namespace) -> dict:
    """Mean KL of bfloat16 to float32, with kernels and without, by prefill and by decoding."""
    path = arguments.model or default_model()
    exact, tokenizer = load(path, mx.float32)
    half, _ = load(path, mx.bfloat16)
    text = (arguments.text or Path(__file__).parents[1] / "README.md").read_text()
    ids = np.array(tokenizer.encode(text)[: arguments.tokens])
    found: dict = {"model": str(Path(path).name), "tokens": len(ids)}
    for way, lengths in (("prefill", []), ("decode", [1] * WINDOW)):
        pieces = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
        pieces = pieces if way == "prefill" else pieces[:1]
        sums = {"kernels": 0.0, "plain": 0.0, "eight_bits": 0.0}
        for piece in pieces:
            with dispatch.plain_operations():
                want = reference.run_chunks(exact, piece, [])
                plain = reference.run_chunks(half, piece, lengths[: len(piece)])
            got = reference.run_chunks(half, piece, lengths[: len(piece)])
            with dispatch.eight_bit_activations():
                eight = reference.run_chunks(half, piece, lengths[: len(piece)])
            sums["eight_bits"] += float(reference.kl(want, eight).mean()) / len(pieces)
            sums["kernels"] += float(reference.kl(want, got).mean()) / len(pieces)
            sums["plain"] += float(reference.kl(want, plain).mean()) / len(pieces)
        found[way] = {**sums, "ratio": sums["kernels"] / max(sums["plain"], 1e-30)}
    return found


if __name__ == "__main__":
    main()
