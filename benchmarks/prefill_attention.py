"""Core attention of a chunk, and index scores and selection, of one layer of Flash, beside the plain bodies.

    MLX_ENABLE_TF32=0 python benchmarks/prefill_attention.py [--tokens N,...] [--depths N,...] [--results FILE]

bfloat16, random rows. The plain bodies take 128 queries at a time, and 32 for the scores.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from device import device
from shapes import numbers

from ds4mlx.custom_kernels.cases import chunk_attention as attention_cases
from ds4mlx.custom_kernels.cases import chunk_scores as scores_cases
from ds4mlx.custom_kernels.cases.index import place_of
from ds4mlx.custom_kernels.layer import chunk_attention, chunk_scores, index_select
from ds4mlx.state.row_forms import forms

KINDS = {"CSA": (4, 512), "HCA": (128, 0), "window": (0, 0)}  # ratio, and rows chosen
HEADS, WIDTH, TOPK = 64, 128, 512  # of the indexer
BLOCK = 1 << 24  # scores at a time


def main() -> None:
    """Print a line for each size, and keep all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=numbers, default=[512, 2048])
    parser.add_argument("--depths", type=numbers, default=[8192, 65536])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    found: dict = {"device": device(), "attention": [], "index": []}
    for depth in arguments.depths:
        for tokens in arguments.tokens:
            found["attention"] += [attention(kind, depth, tokens) for kind in KINDS]
            found["index"].append(index(depth, tokens))
            for row in (*found["attention"][-len(KINDS) :], found["index"][-1]):
                print(json.dumps(row), flush=True)
            if arguments.results:
                arguments.results.write_text(json.dumps(found, indent=1) + "\n")


def milliseconds(call: Callable[[], object], times: int) -> float:
    """Of a call, the mean of some after one."""
    mx.eval(call())
    mx.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        mx.eval(call())
    mx.synchronize()
    return round(1000 * (time.perf_counter() - begun) / times, 3)


def attention(kind: str, depth: int, tokens: int) -> dict:
    """The core attention of a kind of layer."""
    form, _ = forms(512, WIDTH, 64, mx.bfloat16, True)
    ratio, chosen = KINDS[kind]
    chunk = attention_cases.Chunk(depth, tokens, chosen)
    arrays, options = attention_cases.operands(
        ratio, attention_cases.FLASH, chunk, form, mx.bfloat16
    )
    if chosen:
        arrays[4] = mx.where(arrays[4] < len(arrays[3]), arrays[4], -1)
    mx.eval(arrays)
    took = milliseconds(lambda: chunk_attention.by_kernel(*arrays, **options), 5)
    plainly = milliseconds(lambda: plain_attention(arrays, options), 1)
    got = chunk_attention.by_kernel(*arrays, **options).astype(mx.float32)
    want = plain_attention(arrays, options).astype(mx.float32)
    rows = 128 + (chosen or (depth // ratio if ratio else 0))
    mx.clear_cache()
    return {
        "kind": kind,
        "depth": depth,
        "tokens": tokens,
        "kernel_ms": took,
        "tflops": round(4 * tokens * HEADS * 512 * rows / took / 1e9, 1),
        "plain_ms": plainly,
        "max_difference": mx.abs(got - want).max().item(),
        "relative": (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item(),
    }


def plain_attention(arrays: list, options: dict) -> mx.array:
    """The plain body, some queries at a time, one after the other."""
    q, sink, window, rows, chosen, (cos, sin) = arrays
    start, before = options["start"], options["before"]
    low, outs = max(0, start - before), []
    for first in range(0, len(q), 128):
        last, place = min(first + 128, len(q)), start + first
        near = window[max(0, place - before) - low : start + last - low]
        own = None if chosen is None else chosen[first:last]
        block = q[first:last] if not outs else mx.depends([q[first:last]], outs[-1:])[0]
        turns = cos[first:last], sin[first:last]
        more = options | {"start": place}
        outs.append(chunk_attention.plain(block, sink, near, rows, own, turns, **more))
    return mx.concatenate(outs)


def index(depth: int, tokens: int) -> dict:
    """Index scores of all rows, and the best of each query."""
    _, form = forms(512, WIDTH, 64, mx.bfloat16, True)
    q, weights, rows, start, _ = scores_cases.operands(
        (HEADS, WIDTH), depth, tokens, form, mx.bfloat16
    )
    mx.eval(q, weights, rows)
    size = max(1, BLOCK // len(rows))
    cuts = [(first, min(first + size, tokens)) for first in range(0, tokens, size)]

    def scores() -> list[mx.array]:
        layout = form.layout
        return [
            chunk_scores.by_kernel(q[a:b], weights[a:b], rows, start + a, layout) for a, b in cuts
        ]

    blocks = scores()
    mx.eval(blocks)

    def choose() -> list[mx.array]:
        pairs = zip(blocks, cuts, strict=True)
        return [index_select.by_kernel(x, place_of(start + a), TOPK, 4) for x, (a, _) in pairs]

    def plain() -> mx.array:
        return mx.concatenate(list(plain_choice(q, weights, rows, start, form)))

    took = milliseconds(scores, 5)
    pairs = zip(np.array(mx.concatenate(choose())), np.array(plain()), strict=True)
    row = {
        "depth": depth,
        "tokens": tokens,
        "scores_ms": took,
        "tflops": round(2 * tokens * len(rows) * HEADS * WIDTH / took / 1e9, 1),
        "select_ms": milliseconds(choose, 5),
        "plain_ms": milliseconds(plain, 1),
        "rows_that_differ": sum(len(set(a.tolist()) - set(b.tolist())) for a, b in pairs),
        "rows": tokens * TOPK,
    }
    mx.clear_cache()
    return row


def plain_choice(q, weights, rows, start: int, form) -> Iterator[mx.array]:
    """The best rows of each query, some queries at a time, one after the other."""
    last = None
    for first in range(0, len(q), 32):
        part = slice(first, first + 32)
        block = q[part] if last is None else mx.depends([q[part]], [last])[0]
        scores = chunk_scores.plain(block, weights[part], rows, start + first, form)
        last = mx.argpartition(-scores, TOPK - 1, axis=-1)[:, :TOPK]
        yield last


if __name__ == "__main__":
    main()
