"""Where kernels are used: the one place that formats and model code ask.

A kernel takes over where MLX computes on an NVIDIA GPU, the activations are bfloat16 or float32, and
the sizes suit it; everywhere else the plain operations do, which the kernels are checked against.
$DS4MLX_KERNELS=0 asks for those everywhere, and 1 for kernels on Metal too, where none has run yet.
"""

import contextlib
import os
from collections.abc import Iterator

import mlx.core as mx

from ds4mlx.custom_kernels import dialect
from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.layer import hyper_post, hyper_pre, router
from ds4mlx.custom_kernels.products import (
    expert_tiles,
    experts_down,
    experts_down_sorted,
    experts_up,
    experts_up_sorted,
    q8_matmul,
    q8_matvec,
    tiles,
)
from ds4mlx.formats.base import Planes

# Up to this many tokens each reads its own experts; with more, tokens are sorted by expert.
FEW = 8
UP, DOWN = ("iq2_xxs", "q4_k", "mxfp4"), ("q2_k", "q4_k", "mxfp4")

_asked = os.environ.get("DS4MLX_KERNELS")
_forced: bool | None = None
_eight = False


@contextlib.contextmanager
def kernels(used: bool = True) -> Iterator[None]:
    """Inside the block kernels are used wherever there is a GPU, or nowhere."""
    global _forced
    before, _forced = _forced, used
    try:
        yield
    finally:
        _forced = before


def plain_operations() -> contextlib.AbstractContextManager[None]:
    """Inside the block no kernel is used: for comparisons."""
    return kernels(False)


@contextlib.contextmanager
def eight_bit_activations() -> Iterator[None]:
    """Inside the block decoding rounds what its experts are given to 8 bits, where a format can."""
    global _eight
    before, _eight = _eight, True
    try:
        yield
    finally:
        _eight = before


def in_use() -> bool:
    """Whether kernels are asked for and the device can run them."""
    where = dialect.target()
    if where is None:
        return False
    if _forced is not None:
        return _forced
    return _asked == "1" or (where == "cuda" and _asked != "0")


def active(x: mx.array) -> bool:
    """Whether kernels may take activations x."""
    return x.dtype in (mx.bfloat16, mx.float32) and in_use()


def takes_q8(x: mx.array) -> bool:
    """Whether a Q8_0 product with x (..., in) has a kernel."""
    return active(x) and x.shape[-1] % staging.CHUNK == 0


def q8_product(planes: Planes, x: mx.array) -> mx.array:
    """x . W^T: planes of (out, in) with x (..., in), or of (G, out, in) with x (G, n, in)."""
    stacked = planes["weight"].ndim == 3
    rows = x if stacked else x.reshape(-1, x.shape[-1])
    product = q8_matvec.q8_matvec if rows.shape[-2] <= q8_matvec.MOST else q8_matmul.q8_matmul
    return product(planes, rows).reshape(*x.shape[:-1], -1)


def takes_experts(x: mx.array, up: str, down: str, experts: int, hidden: int) -> bool:
    """Whether experts of formats `up` (gate too) and `down` have kernels for tokens x (N, D)."""
    sizes = x.shape[-1] % staging.CHUNK == 0 and hidden % staging.CHUNK == 0
    return active(x) and up in UP and down in DOWN and sizes and experts <= expert_tiles.THREADS


def routed_experts(
    storage: tuple[str, str],
    gate: Planes,
    up: Planes,
    down: Planes,
    x: mx.array,
    experts: mx.array,
    weights: mx.array,
    limit: float,
) -> mx.array:
    """Weighted sum over the chosen experts, float32 (N, D).

    storage: formats of gate and up, and of down; x (N, D), experts int (N, k), weights float32 (N, k).
    """
    rising, falling = storage
    if x.shape[0] <= FEW:
        eight = [_eight and PACKINGS[kind].apart > 0 for kind in storage]
        hidden = experts_up.experts_up(rising, gate, up, x, experts, weights, limit, eight=eight[0])
        return experts_down.experts_down(falling, down, hidden, experts, eight=eight[1])
    flat = experts.flatten()
    order = mx.argsort(flat)
    jobs = expert_tiles.expert_tiles(flat[order], gate["weight"].shape[0], tiles.rows(x.dtype))
    hidden = experts_up_sorted.experts_up_sorted(rising, gate, up, x, order, jobs, weights, limit)
    return experts_down_sorted.experts_down_sorted(
        falling, down, hidden, order, jobs, experts.shape[1]
    )


def takes_routing(x: mx.array, topk: int) -> bool:
    """Whether tokens x (N, D) have a router kernel."""
    return active(x) and x.shape[0] <= FEW and x.shape[1] % 8 == 0 and topk <= 32


def takes_streams(streams: mx.array) -> bool:
    """Whether streams (N, n, D) have the kernels around a sublayer."""
    return active(streams) and streams.shape[1] == hyper_pre.STREAMS and streams.shape[2] % 8 == 0


def takes_few_streams(streams: mx.array) -> bool:
    """As `takes_streams`, for the kernel that takes a few tokens only."""
    return takes_streams(streams) and streams.shape[0] <= FEW


route = router.route
before_sublayer = hyper_pre.hyper_pre
after_sublayer = hyper_post.hyper_post
