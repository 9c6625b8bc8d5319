"""The stored reference outputs of the tiny checkpoint, and small helpers to compare with them."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import v4format

DATA = Path(__file__).parents[1] / "tests/data"
TINY = DATA / "tiny"


def arrays() -> dict[str, np.ndarray]:
    """Every array of the reference file by name."""
    stored = v4format.read_safetensors(TINY / "reference.safetensors")
    return {name: array for name, (_, array) in stored.items()}


def manifest() -> dict:
    return json.loads((TINY / "manifest.json").read_text())


def run(model, ids, cache=None) -> np.ndarray:
    """Logits (T, vocab) of one sequence."""
    return np.array(model(mx.array(np.asarray(ids, np.int32))[None], cache=cache))[0]


def run_chunks(model, ids, lengths, cache=None) -> np.ndarray:
    """Logits (T, vocab) of one sequence fed in chunks of the given lengths, then what is left."""
    cache = model.make_cache() if cache is None else cache
    rows, start = [], 0
    for length in [*lengths, len(ids)]:
        piece = ids[start : start + length]
        if len(piece):
            rows.append(run(model, piece, cache))
            start += len(piece)
    return np.concatenate(rows)


def settle_ties(model) -> None:
    """Where a file asks for llama.cpp's choice among equal index scores, make it on a GPU too."""
    for layer in model.layers:
        if layer.attn.ratio == 4:
            layer.attn.indexer.settles_on_gpu = True


def kl(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL divergence of every row, (T,)."""
    p, q = log_softmax(reference), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
