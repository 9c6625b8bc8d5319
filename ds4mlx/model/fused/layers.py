"""Blocks of the model as launches, one after the other, and what comes before them and after."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.layer.carried import Carried, carry
from ds4mlx.custom_kernels.layer.head_in import head_in
from ds4mlx.custom_kernels.layer.hyper_out import hyper_mix
from ds4mlx.model.block import Block
from ds4mlx.model.fused.attention import product
from ds4mlx.model.fused.block import step_block
from ds4mlx.model.fused.choice import dense_known
from ds4mlx.model.fused.sequences import Places, Sequences, compressors_of
from ds4mlx.model.hyper import HyperHead
from ds4mlx.model.linear import Embedding, Linear, RMSNorm
from ds4mlx.model.rope import Rotary
from ds4mlx.model.taps import HEAD, wanted
from ds4mlx.state.tails import held_in

# What is carried on, and of each sequence the layers' new tails.
Passed = tuple[Carried, list[list[mx.array]]]
# Logits float32 (B, vocab), streams (B, n, D), and the tails of all layers.
Outputs = tuple[mx.array, mx.array, list[list[mx.array]]]


class Sides(NamedTuple):
    """What the launches of a step are told beside what is carried on.

    ids int (B,). held: of each sequence the arrays of the layers' states, see `held_in`. selects:
    whether each selects rows. ways: what else decides which launches there are.
    """

    ids: mx.array
    places: Places
    held: Sequence[Sequence[mx.array]]
    selects: Sequence[int]
    ways: Sequence[int]


class Stepped(Protocol):
    """What a step needs of a model."""

    args: ModelConfig
    embed: Embedding
    layers: list[Block]
    hc_head: HyperHead
    norm: RMSNorm
    head: Linear
    _rotary: dict[int, Rotary]

    def embedded(self, ids: mx.array) -> mx.array: ...
    def logits(self, streams: mx.array) -> mx.array: ...


def begin(model: Stepped, ids: mx.array) -> Carried:
    """The streams of tokens before the first block."""
    count = model.args.hc_mult
    if wanted("", "embed"):
        streams = mx.repeat(model.embedded(ids)[:, None], count, axis=1)
    else:  # looked up so often: a repeated row would be copied for every launch that takes it
        streams = model.embedded(mx.broadcast_to(ids[:, None], (len(ids), count)))
    return carry(streams, hyper_mix(streams, model.layers[0].hc_attn.fn))


def whole(model: Stepped, sides: Sides) -> Outputs:
    """A step through all blocks."""
    carried = begin(model, sides.ids)
    carried, tails = through(model, range(len(model.layers)), carried, sides)
    return *ended(model, carried), tails


def through(model: Stepped, numbers: Sequence[int], carried: Carried, sides: Sides) -> Passed:
    """Blocks that follow each other, of whose states the arrays of `sides` are."""
    ids, places, held, selects, _ = sides
    tails, chosen = [[] for _ in held], [bool(each) for each in selects]
    blocks = [model.layers[number] for number in numbers]
    poolings = [len(compressors_of(block.attn)) for block in blocks]
    by_layer = zip(*(held_in(arrays, poolings) for arrays in held), strict=True)
    for number, block, own in zip(numbers, blocks, by_layer, strict=True):
        told = following(model, number), ids, Sequences(places, own, chosen)
        carried, after = step_block(block, carried, *told)
        for made, each in zip(tails, after, strict=True):
            made.append(each.array)
    return carried, tails


def ended(model: Stepped, carried: Carried) -> tuple[mx.array, mx.array]:
    """Logits float32 (B, vocab), and streams (B, n, D), after the last block."""
    streams = carried.streams
    if dense_known(model.head) and not wanted("", *HEAD):
        return head(model, streams, carried.partial), streams
    return model.logits(streams), streams


def following(model: Stepped, number: int) -> mx.array:
    """The matrix `fn` of the hyper-connection that comes after block `number`."""
    last = number + 1 == len(model.layers)
    return model.hc_head.fn if last else model.layers[number + 1].hc_attn.fn


def head(model: Stepped, streams: mx.array, partial: mx.array) -> mx.array:
    """Logits float32 (B, vocab) of the last streams and their partial mixes."""
    site = model.hc_head
    x = head_in(
        *(streams, partial, site.base, site.scale, model.norm.weight),
        eps=model.args.hc_eps,
        norm_eps=model.args.rms_norm_eps,
    )
    return product(model.head, x)
