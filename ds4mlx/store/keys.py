"""Names of things: prefixes, segments, records, and the model they belong to."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels import dispatch
from ds4mlx.errors import DataError
from ds4mlx.state.kind import StateKind

MOST_IDS = 1 << 31
LAYOUT = 1  # of segments and records; another one is another model


def token_array(
    tokens: Sequence[int] | np.ndarray | mx.array, vocabulary: int = MOST_IDS
) -> np.ndarray:
    """Token ids of one sequence, (n,) or (1, n), as int32 (n,).

    Raises DataError for what are not integers, or not ids of a vocabulary of this size.
    """
    ids = integer_array(tokens)
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise DataError(f"{wrong[0]} is no token id of a vocabulary of {vocabulary:,}")
    return np.ascontiguousarray(ids, dtype="<i4")


def integer_array(tokens: Sequence[int] | np.ndarray | mx.array) -> np.ndarray:
    """Whole numbers of one sequence, (n,) or (1, n), as (n,). Raises DataError for all else."""
    try:
        ids = np.asarray(tokens)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise DataError("the tokens are not one sequence of token ids") from None
    if ids.size == 0:
        return np.empty(0, "<i4")
    if ids.ndim == 0 or ids.shape[-1] != ids.size:
        raise DataError(f"the tokens have the shape {list(ids.shape)}, not that of one sequence")
    if ids.dtype.kind not in "iu":
        raise DataError(f"{ids.flat[0]!s:.80} is no token id, as it is no whole number")
    return ids.reshape(-1)


def prefix_keys(tokens: np.ndarray, lengths: Iterable[int]) -> dict[int, str]:
    """The public keys of prefixes: SHA1 of the token ids, 4 bytes each, little-endian."""
    digest, done, keys = hashlib.sha1(), 0, {}
    for length in sorted(set(lengths)):
        digest.update(tokens[done:length].data)
        done = length
        keys[length] = digest.hexdigest()
    return keys


def prefix_key(tokens: Sequence[int] | np.ndarray) -> str:
    """The public key of all of `tokens`."""
    ids = token_array(tokens)
    return prefix_keys(ids, [len(ids)])[len(ids)]


def segment_key(
    model: str, parent: str, start: int, tokens: np.ndarray, checksums: Iterable[bytes]
) -> str:
    """Of a segment that follows `parent` at `start`: what it holds decides, and what came before."""
    digest = hashlib.sha1(f"segment {model} {parent or '-'} {start}\n".encode())
    digest.update(tokens.data)
    for checksum in checksums:
        digest.update(checksum)
    return digest.hexdigest()


def record_key(model: str, segment: str, tokens: int, checksum: bytes) -> str:
    """Of the boundary record at `tokens` within a segment."""
    return hashlib.sha1(f"record {model} {segment} {tokens}\n".encode() + checksum).hexdigest()


def fingerprint(kind: StateKind, changed: str = "") -> str:
    """What a state must agree in with the model that takes it up.

    Its kind, the changes of the model under which it was made, and the switches of arithmetic, such
    as experts' activations rounded to 8 bits, that are on when it is first saved or looked for.
    """
    switches = {
        **kind.parts(),
        "layout": LAYOUT,
        "eight bits": dispatch.eight_bits(),
        "tf32": os.environ.get("MLX_ENABLE_TF32", ""),
    }
    if changed:
        switches["changed"] = changed
    return hashlib.sha1(json.dumps(switches, sort_keys=True).encode()).hexdigest()
