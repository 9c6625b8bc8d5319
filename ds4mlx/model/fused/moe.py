"""The mixture of experts of one block as launches."""

import mlx.core as mx

from ds4mlx.custom_kernels.products.columns import side_by_side
from ds4mlx.custom_kernels.products.dense_matvec import dense_matvec
from ds4mlx.custom_kernels.products.experts import eight
from ds4mlx.custom_kernels.products.routed_down import Shared, routed_down
from ds4mlx.custom_kernels.products.routed_up import routed_up
from ds4mlx.formats.dense import dense_format
from ds4mlx.model.moe import MoE


def mixture(ffn: MoE, x: mx.array, ids: mx.array) -> list[mx.array]:
    """Outputs of the routed experts and of the shared one, each float32 (B, D).

    x (B, D), normed; ids int (B,). The shared expert's is yet to be rounded to x's type.
    """
    gate, shared, experts = ffn.gate, ffn.shared_experts, ffn.experts
    router = dense_format(gate.weight.dtype), {"weight": gate.weight}
    both = [(m.format, m.planes) for m in (shared.w1, shared.w3)]
    products = dense_matvec([*both, router], x)
    inner, experts_of_all = shared.w1.rows, len(gate.weight)
    gates, ups, logits = side_by_side(products, [inner, inner, experts_of_all])
    by = {"table": gate.tid2eid, "ids": ids} if gate.hashed else {"bias": gate.bias}
    hidden, chosen = routed_up(
        *(experts.w1.format, experts.w1.planes, experts.w3.planes, x, logits),
        scale=gate.scale,
        topk=gate.topk,
        limit=experts.limit,
        eight=eight(experts.w1.format),
        **by,
    )
    routed, common = routed_down(
        *(experts.w2.format, experts.w2.planes, hidden, chosen),
        Shared(shared.w2.format, shared.w2.planes, gates, ups, shared.limit),
        dtype=x.dtype,
        eight=eight(experts.w2.format),
    )
    return [routed, common]
