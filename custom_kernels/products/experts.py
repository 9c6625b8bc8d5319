"""The routed experts of a layer: SwiGLU of gate and up, and the weighted sum of down.

A stack that offers an `operand` may be read by a kernel in its place. One that offers none, since it
adds to the product or has to see it, is called; only its own half is then computed without kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.products import (
    expert_tiles,
    experts_down,
    experts_down_sorted,
    experts_fragments,
    experts_up,
    experts_up_sorted,
    fragments,
    matmul,
)
from ds4mlx.custom_kernels.products.swiglu import swiglu
from ds4mlx.formats import Planes


class Side(NamedTuple):
    """Half of the work: gate and up, or down; what kernels are called, and the formats they take."""

    name: str
    formats: tuple[str, ...]


UP, DOWN = Side("up", ("iq2_xxs", "q2_k", "q4_k", "mxfp4")), Side("down", ("q2_k", "q4_k", "mxfp4"))
# From this many (token, expert) pairs on, plain operations sort them: each weight is read once.
SORT_FROM = 64


class Stack(Protocol):
    """One projection of every expert. It may have an attribute `operand`, an `Operand`."""

    def __call__(self, x: mx.array, experts: mx.array, ordered: bool = False, /) -> mx.array:
        """x (..., 1, in), experts int (...) -> (..., 1, out); `ordered`: experts ascend."""
        ...


class Operand(NamedTuple):
    """What a kernel multiplies by in a stack's place: planes of (experts, out, in) in a format."""

    format: str
    planes: Planes
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Pairs:
    """The (token, expert) pairs of experts (N, k): token by token, or sorted by expert."""

    experts: mx.array
    order: mx.array | None  # pair t * k + slot of each sorted place, uint32 (N * k,)
    jobs: mx.array | None = None  # `expert_tiles` of the sorted pairs, for kernels
    tall: int = 0  # rows that those have at most


def routed_experts(
    gate: Stack,
    up: Stack,
    down: Stack,
    x: mx.array,
    experts: mx.array,
    weights: mx.array,
    limit: float,
    seen: Callable[[str, mx.array], mx.array] | None = None,
) -> mx.array:
    """Weighted sum over the chosen experts, float32 (N, D).

    x (N, D), experts int (N, k), weights float32 (N, k); `limit` clamps gate and up. `seen` asks for
    the plain operations, and is given what down is multiplied by, (N, k, H), as `experts.hidden`, and
    the products (N, k, D), as `experts.each`, to go on from.
    """
    if seen is not None:
        pairs = paired(experts, x, None)
        hidden = plain_up(gate, up, x, pairs, weights, limit)
        return plain_down(down, _seen(seen, hidden, pairs), pairs, seen)
    rising, falling = operands(UP, x, experts, gate, up), operands(DOWN, x, experts, down)
    one = next((each for each in (*rising, *falling)), None)

    def compute(x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        pairs = paired(experts, x, one)
        hidden = _up(gate, up, rising, x, pairs, weights, limit)
        return _down(down, falling, hidden, pairs)

    if one is None:
        return compute(x, experts, weights)
    most = dispatch.most_tokens(experts.shape[1] * max(*one.shape[1:], x.shape[1]))
    return dispatch.in_pieces(compute, most, x, experts, weights)


def operands(side: Side, x: mx.array, experts: mx.array, *stacks: Stack) -> list[Operand]:
    """What the stacks offer, if a kernel takes all of it; otherwise nothing."""
    offered: list[Operand | None] = [getattr(stack, "operand", None) for stack in stacks]
    suit = [each for each in offered if each is not None and takes(side, each, x, experts)]
    alike = len({each.format for each in suit}) == 1
    return suit if len(suit) == len(stacks) and alike else []


def takes(side: Side, stack: Operand, x: mx.array, experts: mx.array) -> bool:
    """Whether kernels multiply by a stack, of one of the side's formats, for tokens x (N, D)."""
    count, rows, columns = stack.shape
    suits = rows % staging.CHUNK == 0 and columns % staging.CHUNK == 0
    suits = suits and count <= expert_tiles.THREADS and experts.shape[1] <= dispatch.MOST_CHOSEN
    suits = suits and stack.format in side.formats
    if len(x) > dispatch.FEW and x.dtype != mx.float32:
        suits = suits and columns % fragments.COLUMNS == 0
    return suits and dispatch.active(x, *kernels(side, stack.format, x))


def kernels(side: Side, stored: str, x: mx.array) -> list[str]:
    """The names of those that multiply tokens x (N, D) by a stack in a format."""
    if len(x) <= dispatch.FEW:
        return [f"experts_{side.name}_{stored}_{staging.arithmetic(x.dtype, eight(stored))}"]
    way = "sorted" if x.dtype == mx.float32 else "fragments"
    names = [f"experts_{side.name}_{way}_{stored}", "expert_tiles"]
    return [*names, "experts_sum"] if side is DOWN else names


def paired(experts: mx.array, x: mx.array, stack: Operand | None) -> Pairs:
    """The pairs, sorted if there are many; `stack`: one that kernels read, if there is one."""
    many = len(x) > dispatch.FEW if stack else experts.size >= SORT_FROM
    if not many:
        return Pairs(experts, None)
    flat = experts.flatten()
    order = mx.argsort(flat)
    if stack is None:
        return Pairs(experts, order)
    count = stack.shape[0]
    rows = tall(x.dtype, experts.size, count)
    return Pairs(experts, order, expert_tiles.expert_tiles(flat[order], count, rows), rows)


def tall(dtype: mx.Dtype, pairs: int, experts: int) -> int:
    """Rows of a tile of so many pairs, sorted by expert, of tokens of a type."""
    return matmul.TALL if dtype == mx.float32 else fragments.tall(pairs / experts)


def _up(
    gate: Stack,
    up: Stack,
    rising: list[Operand],
    x: mx.array,
    pairs: Pairs,
    weights: mx.array,
    limit: float,
) -> mx.array:
    """weight * swiglu(gate . x, up . x) of every pair in its order, (N * k, H) in x's type."""
    if not rising:
        return plain_up(gate, up, x, pairs, weights, limit)
    (stored, gates, _), (_, ups, _) = rising
    if pairs.order is not None:
        assert pairs.jobs is not None
        sides = x, pairs.order, pairs.jobs, weights, limit
        if x.dtype == mx.float32:
            return experts_up_sorted.experts_up_sorted(stored, gates, ups, *sides)
        return experts_fragments.experts_up_fragments(stored, gates, ups, *sides, pairs.tall)
    sides = x, pairs.experts, weights, limit, eight(stored)
    return experts_up.experts_up(stored, gates, ups, *sides)


def plain_up(
    gate: Stack, up: Stack, x: mx.array, pairs: Pairs, weights: mx.array, limit: float
) -> mx.array:
    """`_up` by calls of the stacks."""
    experts, order = pairs.experts, pairs.order
    if order is None:
        rows, weight = x[:, None, None], weights[..., None, None]
    else:
        rows, weight = x[order // experts.shape[1]][:, None], weights.flatten()[order]
        experts, weight = experts.flatten()[order], weight[:, None, None]
    ordered = order is not None
    hidden = weight * swiglu(gate(rows, experts, ordered), up(rows, experts, ordered), limit)
    return hidden.astype(x.dtype).reshape(-1, hidden.shape[-1])


def _seen(seen: Callable[[str, mx.array], mx.array], hidden: mx.array, pairs: Pairs) -> mx.array:
    """The hidden values (N * k, H) of pairs, in their order, once they were seen token by token."""
    shape, order = pairs.experts.shape, pairs.order
    each = hidden if order is None else hidden[mx.argsort(order)]
    each = seen("experts.hidden", each.reshape(*shape, -1)).flatten(0, 1)
    return each if order is None else each[order]


def _down(down: Stack, falling: list[Operand], hidden: mx.array, pairs: Pairs) -> mx.array:
    """Sum of down . hidden over each token's experts, float32 (N, D)."""
    if not falling:
        return plain_down(down, hidden, pairs)
    stored, planes, _ = falling[0]
    experts, topk = pairs.experts, pairs.experts.shape[1]
    if pairs.order is not None:
        assert pairs.jobs is not None
        sides = hidden, pairs.order, pairs.jobs, topk
        if hidden.dtype == mx.float32:
            return experts_down_sorted.experts_down_sorted(stored, planes, *sides)
        return experts_fragments.experts_down_fragments(stored, planes, *sides, pairs.tall)
    return experts_down.experts_down(stored, planes, hidden, experts, eight(stored))


def plain_down(
    down: Stack,
    hidden: mx.array,
    pairs: Pairs,
    seen: Callable[[str, mx.array], mx.array] | None = None,
) -> mx.array:
    """`_down` by a call of the stack."""
    experts, order = pairs.experts, pairs.order
    if order is None:
        out = down(hidden.reshape(*experts.shape, 1, -1), experts, False).squeeze(-2)
    else:
        out = down(hidden[:, None], experts.flatten()[order], True).squeeze(-2)
        out = out[mx.argsort(order)].reshape(*experts.shape, -1)
    if seen is not None:
        out = seen("experts.each", out)
    return out.astype(mx.float32).sum(1)


def eight(stored: str) -> bool:
    """Whether the activations of a format's product are rounded to 8 bits."""
    return dispatch.eight_bits() and PACKINGS[stored].apart > 0
