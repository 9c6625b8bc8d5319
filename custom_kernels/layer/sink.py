"""The core attention: one softmax over rows that are keys and values at once, with a sink."""

from collections.abc import Callable

import mlx.core as mx

# Rows and which of them each query sees: (K, c) and bool (L, K), shared by the queries, or
# (L, K, c) and (L, K), each query's own.
Source = tuple[mx.array, mx.array]


def sink_attention(
    q: mx.array,
    sources: list[Source],
    sink: mx.array,
    scale: float,
    seen: Callable[[list[mx.array]], list[mx.array]] | None = None,
) -> mx.array:
    """One softmax over all sources and a sink; float32 inside.

    q: (L, H, c). The sink (H,) is a logit that only enlarges the denominator. Returns (L, H, c) in
    q's type. `seen` is given the weights (L, H, K) of each source's rows, and last those (L, H, 1) of the
    sink, to go on from.
    """
    wide = q.astype(mx.float32) * scale
    sources = [(rows.astype(mx.float32), mask) for rows, mask in sources]
    logits = [masked(_products(wide, mx.swapaxes(rows, -1, -2)), mask) for rows, mask in sources]
    sinks = mx.broadcast_to(sink.astype(mx.float32)[:, None], (*q.shape[:2], 1))
    weights = mx.softmax(mx.concatenate([*logits, sinks], axis=-1), axis=-1, precise=True)
    parts = split(weights, [rows.shape[-2] for rows, _ in sources])
    if seen is not None:
        parts = seen(parts)
    out = mx.zeros_like(wide)
    for (rows, _), part in zip(sources, parts, strict=False):
        out = out + _products(part, rows)
    return out.astype(q.dtype)


def split(weights: mx.array, counts: list[int]) -> list[mx.array]:
    """Weights (..., sum of counts + 1) as one array for each count, and one for the last."""
    parts, start = [], 0
    for count in (*counts, 1):
        parts.append(weights[..., start : start + count])
        start += count
    return parts


def masked(logits: mx.array, mask: mx.array) -> mx.array:
    """logits (L, H, K) with -inf where mask (L, K) is False."""
    return mx.where(mask[:, None], logits, -mx.inf)


def _products(x: mx.array, rows: mx.array) -> mx.array:
    """x (L, H, i) times rows (i, o), shared by the queries, or (L, i, o)."""
    if rows.ndim == 3:
        return x @ rows
    length, heads, width = x.shape
    return (x.reshape(length * heads, width) @ rows).reshape(length, heads, -1)
