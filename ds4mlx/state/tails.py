"""What a step of one token needs of a decode state: buffers that nobody writes to, and short tails.

All layers are in step: their tails begin at the same token. A tail that is full is moved into its
buffer before the step, so that there is room for a row of each. That changes where rows lie, and
nothing that can be asked of the state.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.layer.buffers import Grown, Held, Recent, Tail, TailForm, begins
from ds4mlx.state import buffers
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.layer import LayerState
from ds4mlx.state.parts import RATIOS, Parts
from ds4mlx.state.step import Step


def settle(state: DecodeState) -> None:
    """Have all layers in step, with room in every tail."""
    parts, first = state.parts, state.parts.recents[0]
    if not _whole(state.layers) or not _alike(parts.recents):
        _begin(state, [layer for layer in state if not _whole([layer])])
    elif first.end - first.settled == buffers.SPAN:
        _move_up(parts.recents)
    for rows in parts.rows.values():
        if rows and (rows[0].full or not _alike(rows)):
            _settle_rows(rows)


def _begin(state: DecodeState, torn: Sequence[LayerState]) -> None:
    """Have every layer's recent rows lie in buffers, and new tails where a layer has not all of its own.

    A tail that stays may hold compressed rows.
    """
    new = {id(part) for layer in torn for part in layer.parts}
    for rows in state.parts.rows.values():
        if any(id(part) in new for part in rows):
            _settle_rows(rows)
    for part in state.parts.recents:
        part.settle()
    for layer in torn:
        layer.empty_tails()


def place(state: DecodeState, number: int, among: int = -1) -> list[int]:
    """Where the next token stands, 8 words: its position, where the tails of what every token makes
    begin, the number of the first row in those of ratio 4 and of ratio 128; its own among the tokens,
    and among those that select rows."""
    parts = state.parts
    fours, others = (rows[0].settled if rows else 0 for rows in parts.rows.values())
    return [state.offset, parts.recents[0].settled, fours, others, number, among, 0, 0]


def held_in(arrays: Sequence[mx.array], poolings: Sequence[int]) -> Iterator[Held]:
    """Of every layer the `arrays` of a settled state's parts, as kernels take them; each with so many
    compressors."""
    lying = iter(arrays[len(poolings) :])
    for tails, count in zip(arrays, poolings, strict=False):
        window, *pooled = (next(lying) for _ in range(1 + 2 * count))
        rooms = [buffers.SPAN, *(buffers.SPAN, buffers.TAIL) * count]
        shapes = zip(rooms, (window, *pooled), strict=True)
        forms = [TailForm((room, *each.shape[1:]), each.dtype) for room, each in shapes]
        own = [Tail(tails, *each) for each in zip(begins(forms), forms, strict=False)]
        parts = zip(pooled[::2], own[1::2], pooled[1::2], own[2::2], strict=True)
        pairs = [(Recent(old, near), Grown(full, far)) for old, near, full, far in parts]
        yield Held(Recent(window, own[0]), pairs)


def append(parts: Parts, tails: Sequence[mx.array], step: Step) -> None:
    """Have the parts take their layers' new tails, with a row of each that the token completes.

    Once a token for every part of every state: so it is done by few statements.
    """
    own = parts.spread(tails)
    step.arrays += tails
    step.change_each(parts.every, "tail", own)
    step.change_each(parts.recents, "end", [step.end] * len(parts.recents))
    for ratio in RATIOS:
        if step.end % ratio == 0:
            rows = parts.rows[ratio]
            step.change_each(rows, "count", [part.count + 1 for part in rows])
    if step.boundaries:
        made = zip(parts, own, strict=True)
        recents = [(part, tail) for part, tail in made if isinstance(part, buffers.Recent)]
        step.pieces |= {(part, step.end): part.piece(tail, step.end) for part, tail in recents}


def _whole(layers: Sequence[LayerState]) -> bool:
    """Whether every layer has the tails of all its parts in one array; loops take Python the least time."""
    for layer in layers:
        tail = layer.window.tail
        for part in layer.parts:
            if tail is None or part.tail is not tail:
                return False
    return True


def _alike(parts: Sequence[buffers.Part]) -> bool:
    """Whether the tails of all begin at the same place."""
    return len({part.settled for part in parts}) <= 1


def _move_up(parts: Sequence[buffers.Recent]) -> None:
    """Have the rows of full tails lie in buffers."""
    moved = _moved_up([[part.buffer, part.tail, part.tail_at] for part in parts])
    for part, buffer in zip(parts, moved, strict=True):
        part.moved_up(buffer)


@mx.compile
def _moved_up(parts: list[list[Any]]) -> list[mx.array]:
    """Buffers that end with the rows of full tails; of each: its own, the array of the tail, and from
    which word on."""
    forms = [TailForm((buffers.SPAN, *own.shape[1:]), own.dtype) for own, _, _ in parts]
    each = zip(parts, forms, strict=True)
    tails = [(own, Tail(array, begin, form).value) for (own, array, begin), form in each]
    return [mx.concatenate([own[len(tail) :], tail]) for own, tail in tails]


def _settle_rows(parts: Sequence[buffers.Rows]) -> None:
    """Append tails to their buffers: in place, so nothing that still runs may look at these."""
    written = [part for part in parts if part.tail is not None]
    if written:
        mx.synchronize()
    for part in parts:
        part.settle()
        if part in written:  # in turn, so that of buffers that grow one at a time is there twice
            mx.eval(part.arrays)
