"""The mixture of experts of one block as launches."""

import mlx.core as mx

from ds4mlx.custom_kernels.layer.carried import Carried
from ds4mlx.custom_kernels.products.columns import side_by_side
from ds4mlx.custom_kernels.products.experts import eight
from ds4mlx.custom_kernels.products.hyper_dense import Before
from ds4mlx.custom_kernels.products.routed_down import Shared, routed_down
from ds4mlx.custom_kernels.products.routed_hyper import Streams, routed_hyper
from ds4mlx.custom_kernels.products.routed_up import routed_up
from ds4mlx.formats import Planes
from ds4mlx.formats.dense import dense_format
from ds4mlx.model.fused.seen import merged
from ds4mlx.model.moe import MoE
from ds4mlx.model.taps import Inside


def routing(ffn: MoE) -> list[tuple[str, Planes]]:
    """The matrices that the tokens are multiplied by first: the shared expert's, and the router's."""
    shared, router = ffn.shared_experts, ffn.gate.weight
    both = [(m.format, m.planes) for m in (shared.w1, shared.w3)]
    return [*both, (dense_format(router.dtype), {"weight": router})]


def mixture(
    ffn: MoE, first: Before, ids: mx.array, streams: Streams, seen: Inside | None = None
) -> Carried:
    """The streams with what the experts give, and their partial mixes.

    first: the tokens x (B, D), normed, and their products by `routing`; ids int (B,). seen: is given
    what the experts give, as `ffn.out`, to go on from.
    """
    gate, shared, experts, x = ffn.gate, ffn.shared_experts, ffn.experts, first.x
    assert x is not None, "the routed experts are multiplied by the tokens too"
    inner, experts_of_all = shared.w1.rows, len(gate.weight)
    gates, ups, logits = side_by_side(first.products, [inner, inner, experts_of_all])
    by = {"table": gate.tid2eid, "ids": ids} if gate.hashed else {"bias": gate.bias}
    values = routed_up(
        *(experts.w1.format, experts.w1.planes, experts.w3.planes, x, logits),
        scale=gate.scale,
        topk=gate.topk,
        limit=experts.limit,
        eight=eight(experts.w1.format),
        **by,
    )
    down = experts.w2.format, experts.w2.planes, values
    own = Shared(shared.w2.format, shared.w2.planes, gates, ups, shared.limit)
    if seen is None:
        return routed_hyper(*down, own, streams, eight=eight(down[0]))
    dtype = streams.before.dtype
    both = routed_down(*down, own, dtype=dtype, eight=eight(down[0]))
    out = (both[0] + both[1].astype(dtype)).astype(dtype)
    return merged(streams.before, seen("ffn.out", out), streams.after, streams.fn)
