"""Logits of a known sequence, a block of positions at a time, and what is summed over tokens.

Tokens times vocabulary never exist as a whole: for a long text of a large vocabulary they are
gigabytes.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.requests import check_ids
from ds4mlx.engine.room import PREFILL_STEP
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState

# Elements of logits that exist at a time.
LOGITS = 1 << 24


@dataclass(frozen=True)
class Mean:
    """A mean over tokens or questions, with its standard error; both NaN-free, 0 of nothing."""

    value: float
    standard_error: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float] | np.ndarray) -> "Mean":
        """The mean of values that count as independent."""
        values = np.asarray(list(values), np.float64)
        count = len(values)
        spread = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        return cls(float(values.mean()) if count else 0.0, spread, count)


def bar(what: str, total: int, unit: str = "tok") -> tqdm:
    """A progress bar on stderr, where that is a terminal; it vanishes in the end."""
    hidden = not sys.stderr.isatty()
    return tqdm(desc=what, total=total, unit=unit, disable=hidden, leave=False, smoothing=0.05)


def logit_blocks(
    model: Model,
    ids: Sequence[int],
    progress: tqdm | None = None,
    step: int = PREFILL_STEP,
    cache: DecodeState | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Logits of a sequence: (first index in ids, float32 (n, vocab)) by blocks.

    progress: told of the tokens as they are done. step: tokens fed at a time. cache: the state
    after what precedes `ids`; default: nothing does.
    Raises DataError for ids outside the vocabulary or a sequence beyond the context.
    """
    cache = model.make_cache() if cache is None else cache
    check_ids(model.args, ids, cache.offset)
    rows = max(1, LOGITS // model.args.vocab_size)
    for start in range(0, len(ids), step):
        chunk = mx.array([list(ids[start : start + step])])
        streams = model.streams(chunk, cache)
        mx.eval(streams)
        for first in range(0, chunk.shape[1], rows):
            logits = model.logits(streams[:, first : first + rows])[0]
            mx.eval(logits)
            yield start + first, logits
        mx.clear_cache()
        if progress is not None:
            progress.update(chunk.shape[1])


def read(model: Model, ids: Sequence[int], progress: tqdm | None = None) -> DecodeState:
    """The state after a sequence of which no logits are wanted; it can be rewound to there.

    Raises DataError as `logit_blocks` does.
    """
    check_ids(model.args, ids)
    cache, told = model.make_cache(), 0 if progress is None else progress.n
    cache.add_boundary(len(ids))

    def on_chunk(done: int, total: int) -> None:
        if progress is not None:
            progress.update(told + done - progress.n)

    if ids:
        prefill(model, ids, cache, on_chunk=on_chunk)
    return cache


def target_scores(
    model: Model,
    ids: Sequence[int],
    progress: tqdm | None = None,
    step: int = PREFILL_STEP,
    cache: DecodeState | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Of each token but the first: its log-probability given those before, and whether it leads.

    Returns float64 (T - 1,) and bool (T - 1,): entry i is about token i + 1. cache: as for
    `logit_blocks`.
    """
    log_probs: list[np.ndarray] = []
    leads: list[np.ndarray] = []
    for first, logits in logit_blocks(model, ids, progress, step, cache):
        following = mx.array(list(ids[first + 1 : first + 1 + len(logits)]), mx.int32)
        logits = logits[: len(following)]
        if not len(following):
            break
        chosen = mx.take_along_axis(logits, following[:, None], axis=-1)[:, 0]
        log_probs.append(np.array(chosen - mx.logsumexp(logits, axis=-1), np.float64))
        leads.append(np.array(mx.argmax(logits, axis=-1).astype(mx.int32) == following))
    if not log_probs:
        return np.zeros(0), np.zeros(0, bool)
    return np.concatenate(log_probs), np.concatenate(leads)
