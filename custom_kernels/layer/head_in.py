"""What the head is given: the last streams collapsed by weights out of partial mixes, and normed."""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer import hyper_text
from ds4mlx.custom_kernels.layer.hyper_in import collapsing, mixes, suits
from ds4mlx.custom_kernels.layer.hyper_pre import STREAMS, collapse
from ds4mlx.custom_kernels.layer.plain import rms_norm
from ds4mlx.custom_kernels.words import LOAD8

_BODY = f"""
    bool collapses = true;
{hyper_text.LOADS}{hyper_text.MIXES}{hyper_text.COLLAPSE}{hyper_text.STORE}
"""


@lru_cache
def kernel() -> Kernel:
    """The kernel; the streams' type is a template argument."""
    inputs = ["streams", "partial", "base", "scale", "weight"]
    header = LOAD8 + hyper_text.EIGHT + hyper_text.STORES + hyper_text.SIGMOID
    return Kernel("head_in", inputs, ["out"], _BODY, header)


def head_in(
    streams: mx.array,
    partial: mx.array,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    *,
    eps: float,
    norm_eps: float,
) -> mx.array:
    """The head's input (B, D), normed.

    streams (B, n, D); partial float32 (B, P, n + 1), of the streams: see `hyper_out`; base (n,) and
    scale (1,) float32; norm (D,), the weight of the norm.
    """
    way = by_kernel if takes(streams) else plain
    return way(streams, partial, base, scale, norm, eps=eps, norm_eps=norm_eps)


def takes(streams: mx.array) -> bool:
    """Whether the kernel collapses streams (B, n, D)."""
    return suits(streams) and dispatch.active(streams, "head_in")


def plain(
    streams: mx.array,
    partial: mx.array,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    *,
    eps: float,
    norm_eps: float,
) -> mx.array:
    """`head_in` by MLX's own operations."""
    pre = mx.sigmoid(mixes(streams, partial, norm_eps) * scale + base) + eps
    return rms_norm(collapse(streams, pre), norm, norm_eps)


def by_kernel(
    streams: mx.array,
    partial: mx.array,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    *,
    eps: float,
    norm_eps: float,
) -> mx.array:
    """`head_in` in one launch; see `hyper_in.suits`."""
    (count, _, width), slices = streams.shape, partial.shape[1]
    return kernel()(
        [streams, partial, base, scale, norm],
        [((count, width), streams.dtype)],
        groups=(1, count, 1),
        threads=32 * hyper_text.GROUPS,
        template=collapsing(streams.dtype, width, slices, STREAMS, eps, norm_eps),
    )[0]
