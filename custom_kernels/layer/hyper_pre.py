"""What a hyper-connection does before its sublayer, by plain operations, and its sizes.

The mixes are a product with all streams, normed; of them sigmoids make the weights with which the
streams are collapsed and those of what the sublayer gives, and Sinkhorn's iterations those between
streams.
"""

from collections.abc import Callable
from typing import TypedDict, Unpack

import mlx.core as mx

from ds4mlx.custom_kernels.layer.plain import rms_norm

STREAMS = 4  # kernels are laid out for so many
MIXES = (2 + STREAMS) * STREAMS


class Sizes(TypedDict):
    """What is added to the weights and under the norm's root, and Sinkhorn's iterations."""

    iterations: int
    eps: float
    norm_eps: float


def plain(
    streams: mx.array,
    fn: mx.array,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    *,
    seen: Callable[[str, mx.array], mx.array] | None = None,
    **sizes: Unpack[Sizes],
) -> tuple[mx.array, mx.array, mx.array]:
    """`hyper_before.before_sublayer` by MLX's own operations."""
    n, eps = streams.shape[-2], sizes["eps"]
    mix = project(streams, fn, sizes["norm_eps"])
    to_pre, to_post, to_comb = mx.split(mix, [n, 2 * n], axis=-1)
    base_pre, base_post, base_comb = mx.split(base, [n, 2 * n])
    pre = mx.sigmoid(to_pre * scale[0] + base_pre) + eps
    if seen is not None:
        pre = seen("pre", pre)
    post = 2 * mx.sigmoid(to_post * scale[1] + base_post)
    logits = to_comb * scale[2] + base_comb
    comb = sinkhorn(logits.reshape(*logits.shape[:-1], n, n), sizes["iterations"], eps)
    collapsed = collapse(streams, pre)
    if seen is not None:
        collapsed = seen("collapsed", collapsed)
    return rms_norm(collapsed, norm, sizes["norm_eps"]), post, comb


def project(streams: mx.array, fn: mx.array, eps: float) -> mx.array:
    """fn . RMSNorm(flattened streams), float32: (..., n, D) -> (..., rows of fn)."""
    return mx.fast.rms_norm(streams.astype(mx.float32).flatten(-2), None, eps) @ fn.T


def collapse(streams: mx.array, pre: mx.array) -> mx.array:
    """sum_j pre_j stream_j: (..., n, D), (..., n) -> (..., D) in the streams' type."""
    mixed = pre[..., None, :] @ streams.astype(mx.float32)
    return mixed.squeeze(-2).astype(streams.dtype)


def sinkhorn(logits: mx.array, iterations: int, eps: float) -> mx.array:
    """Nearly doubly stochastic (..., n, n): softmax of rows, then columns and rows in turn.

    Ends on columns, so each destination's weights sum to about 1.
    """
    comb = mx.softmax(logits, axis=-1, precise=True) + eps
    comb = comb / (comb.sum(-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdims=True) + eps)
        comb = comb / (comb.sum(-2, keepdims=True) + eps)
    return comb
