"""Whole models through the kernels on this GPU, against the same through plain operations.

    MLX_ENABLE_TF32=0 python benchmarks/kernel_model.py [--text FILE] [--tokens N] [--decoded N] \
        [--models official,q2] [--eight-bits] [--results FILE]

The embedded model in bfloat16 on a text, as it is and at 2 bits: the mean KL divergence to float32 with
kernels, without, and, if asked for, with 8-bit activations (which only decoding at 2 bits has). Without
kernels all tokens are fed at once. And the logits in float32 without rounding, of a q2 file by ds4's own
quantiser and of the reference checkpoint, against those of llama.cpp and of the official code.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))
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
from ds4mlx.engine.default_model import EMBEDDED, default_model
from ds4mlx.model.model import Model

HELD_OUT = Path(__file__).parents[1] / "ds4mlx" / "evaluation" / "held_out.txt"
PIECE = 2048  # tokens of a sequence


def main() -> None:
    """Print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--decoded", type=int, default=4096, help="of them, one by one")
    parser.add_argument("--models", default="official,q2", help="whose KL is measured")
    parser.add_argument("--eight-bits", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if dialect.target() is None:
        sys.exit("kernels run on a GPU, and MLX has none here")
    text = arguments.text.read_text(encoding="utf-8")
    found: dict = {"device": device(), "kl": {}, "logits": []}

    def keep(part: str, value: dict) -> None:
        print(part, json.dumps(value), flush=True)
        if arguments.results:
            arguments.results.write_text(json.dumps(found, indent=1) + "\n")

    with dispatch.kernels(), tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, path in models(scratch, arguments.models.split(",")):
            found["kl"][name] = divergence(path, text, arguments)
            keep(name, found["kl"][name])
        for rows in (q2_file(scratch), checkpoint(scratch)):
            found["logits"] += rows
            keep("logits", {"rows": rows})


def models(scratch: Path, names: list[str]) -> Iterator[tuple[str, Path]]:
    """The embedded model as it is, and at 2 bits."""
    if "official" in names:
        yield "official", default_model()
    if "q2" in names:
        convert(EMBEDDED, scratch / "2bit", recipe="q2", progress=False)
        yield "q2", scratch / "2bit"


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
    """Largest differences of float32 logits, for a whole prompt, in chunks and token by token."""
    model, _ = load(path, mx.float32, "none")
    reference.settle_ties(model)
    rows = []
    ways = {"prefill": [], "chunks": [37, 20, 9, 11], "decode": [1] * len(ids)}
    for way, lengths in ways.items():
        got = reference.run_chunks(model, ids, lengths)
        rows.append(
            {
                "what": name,
                "way": way,
                "max_difference": float(np.abs(got - want).max()),
            }
        )
    return rows


def divergence(path: Path, text: str, asked: argparse.Namespace) -> dict:
    """Mean KL of bfloat16 to float32, nats a token: by prefill, and decoding the first tokens."""
    exact, tokenizer = load(path, mx.float32)
    half, _ = load(path, mx.bfloat16)
    ids = np.array(tokenizer.encode(text)[: asked.tokens])
    return {
        "tokens": len(ids),
        "prefill": means(exact, half, _cut(ids), []),
        "decoded": asked.decoded,
        "decode": means(exact, half, _cut(ids[: asked.decoded]), [1] * PIECE, asked.eight_bits),
    }


def _cut(ids: np.ndarray) -> list[np.ndarray]:
    return [ids[i : i + PIECE] for i in range(0, len(ids), PIECE)]


def means(
    exact: Model, half: Model, pieces: list[np.ndarray], lengths: list[int], eight: bool = False
) -> dict:
    """Mean KL of each way over pieces fed in chunks of `lengths`; the standard error of the first two's
    difference, from piece to piece."""
    found: dict[str, list[float]] = {name: [] for name in ("kernels", "plain", "eight_bits")}
    for piece in pieces:
        with dispatch.plain_operations():
            want = reference.run_chunks(exact, piece, [])
            plain = reference.run_chunks(half, piece, [])
        found["plain"].append(float(reference.kl(want, plain).mean()))
        got = reference.run_chunks(half, piece, lengths[: len(piece)])
        found["kernels"].append(float(reference.kl(want, got).mean()))
        if eight:
            with dispatch.eight_bit_activations():
                got = reference.run_chunks(half, piece, lengths[: len(piece)])
            found["eight_bits"].append(float(reference.kl(want, got).mean()))
    result = {name: float(np.mean(values)) for name, values in found.items() if values}
    apart = np.subtract(found["kernels"], found["plain"])
    if len(pieces) > 1:
        result["error_of_difference"] = float(apart.std(ddof=1) / len(apart) ** 0.5)
    return {**result, "ratio": result["kernels"] / result["plain"]}


if __name__ == "__main__":
    main()
