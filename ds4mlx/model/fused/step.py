"""The whole model for one token of each of a few sequences: traced once, replayed every token."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import compress
from operator import is_
from typing import Any, Protocol

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.custom_kernels.first_use import prepare
from ds4mlx.custom_kernels.layer.carried import Carried, carry
from ds4mlx.custom_kernels.layer.head_in import head_in
from ds4mlx.custom_kernels.layer.hyper_out import hyper_mix
from ds4mlx.model.batch import Batch
from ds4mlx.model.block import Block
from ds4mlx.model.fused.attention import product
from ds4mlx.model.fused.block import step_block
from ds4mlx.model.fused.choice import by_modules, dense_known, known
from ds4mlx.model.fused.sequences import Places, Sequences, compressors_of
from ds4mlx.model.hyper import HyperHead
from ds4mlx.model.linear import Embedding, Linear, RMSNorm
from ds4mlx.model.module import changes
from ds4mlx.model.rope import AT_ONCE, Rotary, step_angles
from ds4mlx.model.taps import listened
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.parts import Parts
from ds4mlx.state.tails import append, held_in, place, settle

# What a traced step gives: logits (B, vocab), streams (B, n, D), and of each sequence every layer's new tails.
Traced = tuple[mx.array, mx.array, list[list[mx.array]]]


@dataclass(frozen=True)
class TracedStep:
    """A traced step, with the weights that it holds.

    changes, layers: how often a module had been changed, and the blocks, when it was made. apart:
    whether some blocks go through their modules, which no trace does. compared: kinds of steps whose
    kernels were compared with plain operations, if they had to be.
    """

    changes: int
    layers: list[Block]
    apart: bool
    call: Callable[..., Traced]
    compared: set[tuple[object, ...]] = field(default_factory=set)


class Stepped(Protocol):
    """What a step needs of a model, which keeps its traced step."""

    args: ModelConfig
    embed: Embedding
    layers: list[Block]
    hc_head: HyperHead
    norm: RMSNorm
    head: Linear
    _rotary: dict[int, Rotary]
    _traced: "TracedStep | None"

    def embedded(self, ids: mx.array) -> mx.array: ...
    def logits(self, streams: mx.array) -> mx.array: ...


def step_outputs(
    model: Stepped, batch: Batch, states: Sequence[DecodeState]
) -> tuple[mx.array, mx.array]:
    """Logits float32 (B, vocab) and streams (B, n, D) after one more token of each state.

    The batch's steps take the rows.
    """
    for state in states:
        settle(state)
    held = [state.parts.arrays for state in states]
    selects = [int(_selects(model, state)) for state in states]
    places = _places(model, states, selects)
    step = _compiled(model)
    if step.apart or listened() or not dispatch.in_use() or dialect.launcher() is not None:
        apart = by_modules(model.layers)
        return _in_parts(model, batch, states, places, held, selects, apart)
    sides = batch.ids, places, held, selects, dispatch.ways()
    _compare_first(model, step, states, sides)
    logits, streams, tails = step.call(*sides)
    for span, state, own in zip(batch.spans, states, tails, strict=True):
        append(state.parts, own, span.step)
    return logits, streams


def _places(model: Stepped, states: Sequence[DecodeState], selects: Sequence[int]) -> Places:
    """Where the next token of each state stands."""
    among = [sum(selects[:number]) if own else -1 for number, own in enumerate(selects)]
    every = [place(state, number, among[number]) for number, state in enumerate(states)]
    which, placed = list(compress(every, selects)), _placed(every)
    # Where all select, one array is both: to make another takes longer than the rest of this.
    selecting = placed if which == every else mx.array(which, mx.int32) if which else None
    angles = step_angles(model._rotary, [state.offset for state in states])
    return Places(placed, selecting, angles)


def _placed(places: list[list[int]]) -> mx.array:
    """Where tokens stand, int32 (B, 8): of one, a view of what was made for those that follow it too."""
    if len(places) > 1:
        return mx.array(places, mx.int32)
    [(position, *rest)] = places
    own = position % AT_ONCE
    return _held_places(position - own, *rest)[own : own + 1]


@lru_cache(maxsize=64)
def _held_places(begin: int, *rest: int) -> mx.array:
    """Where AT_ONCE tokens from `begin` on stand, while nothing but the position changes: int32 (., 8)."""
    return mx.array([[begin + n, *rest] for n in range(AT_ONCE)], mx.int32)


def _selects(model: Stepped, state: DecodeState) -> bool:
    """Whether there are more rows of ratio 4 than are kept, once the next token is in."""
    return (state.offset + 1) // 4 > model.args.index_topk


def _compiled(model: Stepped) -> TracedStep:
    """The traced step of a model, made anew where a part of the model is another than it was."""
    kept = model._traced
    same = kept is not None and kept.changes == changes()
    if kept is None or not same or not all(map(is_, kept.layers, model.layers)):
        apart = not all(map(known, model.layers))
        traced = mx.compile(partial(_traced, model))
        kept = model._traced = TracedStep(changes(), list(model.layers), apart, traced)
    return kept


def _compare_first(
    model: Stepped, step: TracedStep, states: Sequence[DecodeState], sides: tuple[Any, ...]
) -> None:
    """Have the kernels of a step compared that never were here, since inside a trace nothing can be."""
    if dispatch.decided() is not None:
        return
    key = (*(state.parts.capacity for state in states), *sides[-2])
    if key not in step.compared:
        prepare(lambda: _traced(model, *sides))
        step.compared.add(key)


def _traced(
    model: Stepped,
    ids: mx.array,
    places: Places,
    held: Sequence[Sequence[mx.array]],
    selects: Sequence[int],
    ways: Sequence[int],
) -> Traced:
    """The step as a function of arrays. `ways`: what else decides which launches there are."""
    carried, tails = begin(model, ids), [[] for _ in held]
    layers = _layers(model, places, held, selects)
    for number, (layer, sequences) in enumerate(zip(model.layers, layers, strict=True)):
        carried, after = step_block(layer, carried, following(model, number), ids, sequences)
        for own, each in zip(tails, after, strict=True):
            own.append(each.array)
    streams, known = carried.streams, dense_known(model.head)
    logits = head(model, streams, carried.partial) if known else model.logits(streams)
    return logits, streams, tails


def _in_parts(
    model: Stepped,
    batch: Batch,
    states: Sequence[DecodeState],
    places: Places,
    held: Sequence[Sequence[mx.array]],
    selects: Sequence[int],
    modules: frozenset[int],
) -> tuple[mx.array, mx.array]:
    """The same without tracing, some blocks through their modules."""
    carried = begin(model, batch.ids)
    layers = _layers(model, places, held, selects)
    for number, (layer, sequences) in enumerate(zip(model.layers, layers, strict=True)):
        if number in modules:
            streams = layer(carried.streams, batch, [state[number] for state in states])
            carried = carry(streams, hyper_mix(streams, following(model, number)))
        else:
            sides = following(model, number), batch.ids, sequences
            carried, after = step_block(layer, carried, *sides)
            for span, state, each in zip(batch.spans, states, after, strict=True):
                append(Parts([state[number]]), [each.array], span.step)
    streams, known = carried.streams, dense_known(model.head) and not listened()
    logits = head(model, streams, carried.partial) if known else model.logits(streams)
    return logits, streams


def begin(model: Stepped, ids: mx.array) -> Carried:
    """The streams of tokens before the first block."""
    count = model.args.hc_mult
    if listened():
        streams = mx.repeat(model.embedded(ids)[:, None], count, axis=1)
    else:  # looked up so often: a repeated row would be copied for every launch that takes it
        streams = model.embedded(mx.broadcast_to(ids[:, None], (len(ids), count)))
    return carry(streams, hyper_mix(streams, model.layers[0].hc_attn.fn))


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


def _layers(
    model: Stepped, places: Places, held: Sequence[Sequence[mx.array]], selects: Sequence[int]
) -> Iterator[Sequences]:
    """What the launches of each layer are told of the sequences."""
    poolings = [len(compressors_of(layer.attn)) for layer in model.layers]
    by_sequence = [held_in(arrays, poolings) for arrays in held]
    chosen = [bool(each) for each in selects]
    for layers in zip(*by_sequence, strict=True):
        yield Sequences(places, layers, chosen)
