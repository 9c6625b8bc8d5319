"""Index scores that are exactly equal: which rows are kept.

A row scores exactly 0 where every head's ReLU is shut, so with few heads equal scores can straddle the
selection's edge (with V4-Flash's 64 heads they do not). Any choice is right, and the logits differ by
it. For checkpoints that come from GGUF files the choice on the CPU is that of llama.cpp's CPU back-end,
so that logits can be compared with its.
"""

import heapq

import mlx.core as mx
import numpy as np


class Scored(float):
    """A score that knows its row."""

    row: int


def settle(scores: mx.array, chosen: mx.array) -> mx.array:
    """Replace choices (L, k) that equal scores (L, R) left open by those of a heap."""
    wide, picked = np.array(scores), np.array(chosen)
    k = picked.shape[-1]
    best = -np.partition(-wide, (k - 1, k), axis=-1)
    open_ = (best[..., k - 1] == best[..., k]) & np.isfinite(best[..., k])
    for place in zip(*np.nonzero(open_), strict=True):
        picked[place] = by_heap(wide[place], k)
    return mx.array(picked)


def by_heap(scores: np.ndarray, k: int) -> list[int]:
    """The k best rows as a bounded heap finds them in one pass; a later equal does not displace."""
    rows = []
    for number, score in enumerate(scores.tolist()):
        rows.append(Scored(score))
        rows[-1].row = number
    heap = rows[:k]
    heapq.heapify(heap)
    for scored in rows[k:]:
        if scored > heap[0]:
            heapq.heapreplace(heap, scored)
    return [scored.row for scored in heap]
