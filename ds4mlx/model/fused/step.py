"""The whole model for one token of each of a few sequences: traced once, replayed every token.

What no trace does is done without one: blocks that go through their modules, and those of which
somebody hears something else every time. The blocks between them are traced by themselves.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import compress, groupby
from typing import Literal, Protocol

import mlx.core as mx

from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.custom_kernels.first_use import prepare
from ds4mlx.custom_kernels.layer.carried import Carried, carry
from ds4mlx.custom_kernels.layer.hyper_out import hyper_mix
from ds4mlx.model.batch import Batch
from ds4mlx.model.fused import layers
from ds4mlx.model.fused.choice import hiding
from ds4mlx.model.fused.layers import Sides
from ds4mlx.model.fused.seen import SHOWN
from ds4mlx.model.fused.sequences import Places
from ds4mlx.model.fused.traced import Traced, Traces
from ds4mlx.model.rope import AT_ONCE, step_angles
from ds4mlx.model.taps import listeners, steady, wanted
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.parts import Parts
from ds4mlx.state.tails import append, place, settle

# How a block is computed: by its modules, by launches that somebody may hear, or by traced ones.
Way = Literal["modules", "open", "traced"]


class Stepped(layers.Stepped, Protocol):
    """What a step needs of a model, which keeps what was traced of it."""

    _traced: Traces


def step_outputs(
    model: Stepped, batch: Batch, states: Sequence[DecodeState]
) -> tuple[mx.array, mx.array]:
    """Logits float32 (B, vocab) and streams (B, n, D) after one more token of each state.

    The batch's steps take the rows.
    """
    for state in states:
        settle(state)
    selects = [int(_selects(model, state)) for state in states]
    places, kept, alike = _places(model, states, selects), _kept(model), steady()
    held = [state.parts.arrays for state in states]
    sides = Sides(batch.ids, places, held, selects, dispatch.ways())
    modules = kept.modules if alike else kept.modules | hiding(model.layers)
    if _traceable(kept) and alike and not modules:
        _compare_first(model, kept, states, sides)
        outputs = kept.whole(model, sides)
        if outputs is not None:
            logits, streams, tails = outputs
            for span, state, own in zip(batch.spans, states, tails, strict=True):
                append(state.parts, own, span.step)
            return logits, streams
    return _in_parts(model, kept, batch, states, sides, modules)


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


def _kept(model: Stepped) -> Traced:
    """What was traced of a model with those who listen, if these do the same to every call."""
    return model._traced.of(model, listeners() if steady() else ())


def _traceable(kept: Traced) -> bool:
    """Whether launches are traced here, and not noted or run by something else than MLX."""
    return dispatch.in_use() and dialect.launcher() is None and not kept.failed


def _compared(kept: Traced, states: Sequence[DecodeState], sides: Sides, *ways: Way) -> bool:
    """Whether the kernels of such a step were compared, or need not be; from now on they were.

    ways: of its blocks, where these are computed in different ones.
    """
    key = (*(state.parts.capacity for state in states), *sides.selects, *ways)
    if dispatch.decided() is not None or key in kept.compared:
        return True
    kept.compared.add(key)
    return False


def _compare_first(
    model: Stepped, kept: Traced, states: Sequence[DecodeState], sides: Sides
) -> None:
    """Have the kernels of a step compared that never were here, since inside a trace nothing can be."""
    if not _compared(kept, states, sides):
        prepare(lambda: layers.whole(model, sides))


def _in_parts(
    model: Stepped,
    kept: Traced,
    batch: Batch,
    states: Sequence[DecodeState],
    sides: Sides,
    modules: frozenset[int],
) -> tuple[mx.array, mx.array]:
    """The same step, some blocks through their modules; of the others those are traced that can be."""
    ways = _ways(model, modules, _traceable(kept))
    if "traced" in ways and not _compared(kept, states, sides, *ways):
        ways = _ways(model, modules, False)
    carried = layers.begin(model, batch.ids)
    for way, numbers in _runs(ways):
        if way == "modules":
            carried = _by_modules(model, numbers, carried, batch, states)
        else:
            traces = kept if way == "traced" else None
            carried = _by_launches(model, traces, numbers, carried, batch, states, sides)
    return layers.ended(model, carried)


def _ways(model: Stepped, modules: frozenset[int], trace: bool) -> list[Way]:
    """How each block is computed."""
    alike, ways = steady(), list[Way]()
    for number, block in enumerate(model.layers):
        same = alike or not wanted(block._site, *SHOWN)
        by_launches: Way = "traced" if trace and same else "open"
        ways.append("modules" if number in modules else by_launches)
    return ways


def _runs(ways: Sequence[Way]) -> Iterator[tuple[Way, list[int]]]:
    """Blocks that follow each other and are computed in the same way."""
    first = 0
    for _, each in groupby(ways):
        last = first + len(list(each))
        yield ways[first], list(range(first, last))
        first = last


def _by_modules(
    model: Stepped,
    numbers: Sequence[int],
    carried: Carried,
    batch: Batch,
    states: Sequence[DecodeState],
) -> Carried:
    """What is carried on after blocks in turn, each by its modules."""
    streams = carried.streams
    for number in numbers:
        streams = model.layers[number](streams, batch, [state[number] for state in states])
    return carry(streams, hyper_mix(streams, layers.following(model, numbers[-1])))


def _by_launches(
    model: Stepped,
    kept: Traced | None,
    numbers: Sequence[int],
    carried: Carried,
    batch: Batch,
    states: Sequence[DecodeState],
    sides: Sides,
) -> Carried:
    """What is carried on after blocks in turn by launches, traced if there is what was traced."""
    parts = [Parts([state[number] for number in numbers]) for state in states]
    own = sides._replace(held=[each.arrays for each in parts])
    passed = None if kept is None else kept.through(model, numbers, carried, own)
    if passed is None:
        passed = layers.through(model, numbers, carried, own)
    carried, tails = passed
    for span, each, new in zip(batch.spans, parts, tails, strict=True):
        append(each, new, span.step)
    return carried
