"""Changes that are often wanted, to be given to `model.intervene`."""

from collections.abc import Callable, Iterable

import mlx.core as mx
import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.research.intervene import Edit
from ds4mlx.research.places import Where, chosen_positions
from ds4mlx.research.trace import Piece, Trace, fitted


def scale(factor: float | mx.array) -> Edit:
    """Multiply the value, in float32."""
    return lambda value, where: value.astype(mx.float32) * factor


def add(vector: mx.array) -> Edit:
    """Add a vector (D,), or whatever fits the value, in float32."""
    change = addition(vector)
    return lambda value, where: change(value)


def addition(vector: mx.array) -> Callable[[mx.array], mx.array]:
    """What adds a vector, in float32."""
    return lambda value: value.astype(mx.float32) + vector


def ablate() -> Edit:
    """Put zeros in the value's place."""
    return lambda value, where: mx.zeros_like(value)


def project_out(direction: mx.array, strength: float = 1.0) -> Edit:
    """Take the part along a direction (D,), of any length but 0, out of the value (..., D)."""
    change = projection(direction, strength)
    return lambda value, where: change(value)


def projection(direction: mx.array, strength: float) -> Callable[[mx.array], mx.array]:
    """What takes so much of the part along a direction (D,) out of a value (..., D), in float32."""
    unit = mx.array(direction).astype(mx.float32)
    length = float(mx.linalg.norm(unit))
    if not 0 < length < float("inf"):
        raise DataError(f"a direction of length {length} has no part of a value along it")
    unit = unit / length

    def change(value: mx.array) -> mx.array:
        wide = value.astype(mx.float32)
        return wide - strength * (wide * unit).sum(-1, keepdims=True) * unit

    return change


def at(positions: Iterable[int] | int, edit: Edit) -> Edit:
    """Change the value at some positions only, where other changes of a block are for all."""
    asked = chosen_positions(positions)

    def change(value: mx.array, where: Where) -> mx.array:
        mask = mx.array(asked(np.array(where.positions)))
        return mx.where(_wide(mask, value), edit(value, where).astype(value.dtype), value)

    return change


def ablate_experts(*experts: int) -> Edit:
    """At `ffn.router.weights`: have these experts add nothing; the others keep their weights."""
    if any(expert < 0 for expert in experts):
        raise DataError(f"experts have numbers from 0 on, and not all of {experts}")

    def change(value: mx.array, where: Where) -> mx.array:
        if where.experts is None or value.shape != where.experts.shape:
            raise _misplaced(where, "ffn.router.weights")
        _check_there(where, experts, where.expert_count)
        return mx.where(_among(where.experts, experts), 0, value)

    return change


def force_experts(*experts: int) -> Edit:
    """At `ffn.router.choice`: have these experts chosen, in place of those that score least."""
    return _choosing(experts, float("inf"))


def forbid_experts(*experts: int) -> Edit:
    """At `ffn.router.choice`: have these experts not chosen; the next best take their places."""
    return _choosing(experts, -float("inf"))


def _choosing(experts: tuple[int, ...], choice: float) -> Edit:
    def change(value: mx.array, where: Where) -> mx.array:
        if not where.name.endswith("ffn.router.choice"):
            raise _misplaced(where, "ffn.router.choice")
        _check_there(where, experts, value.shape[-1])
        return mx.where(_among(mx.arange(value.shape[-1]), experts), choice, value)

    return change


def _check_there(where: Where, experts: tuple[int, ...], count: int) -> None:
    if not all(0 <= expert < count for expert in experts):
        raise DataError(f"{where.name} is about experts 0 to {count - 1}, not all of {experts}")


def hide_rows(*rows: int) -> Edit:
    """At `attn.visible`: hide compressed rows of these numbers; at `attn.window_visible`: raw rows of
    these positions."""

    def change(value: mx.array, where: Where) -> mx.array:
        if where.rows is None or value.dtype != mx.bool_:
            raise _misplaced(where, "attn.visible or attn.window_visible")
        return value & ~_among(where.rows, rows)

    return change


def force_rows(*rows: int) -> Edit:
    """At `attn.indexer.scores`: have compressed rows of these numbers chosen wherever visible."""

    def change(value: mx.array, where: Where) -> mx.array:
        if where.rows is None or not where.name.endswith("attn.indexer.scores"):
            raise _misplaced(where, "attn.indexer.scores")
        return mx.where(_among(where.rows, rows), float("inf"), value)

    return change


def patch(trace: Trace) -> Edit:
    """Put in the value's place what a trace has of the same name, sequence and positions.

    A trace of one sequence is for all. What is not in the trace at a position stays.
    """

    def change(value: mx.array, where: Where) -> mx.array:
        found = trace.sequences(where.name)
        sides = zip(value, np.array(where.sequence), np.array(where.positions), strict=True)
        return mx.stack(
            [_patched(where.name, own, _of(found, n, where), places) for own, n, places in sides]
        )

    return change


def _of(found: list[Piece], number: int, where: Where) -> Piece:
    """What a trace has of a sequence."""
    if len(found) > 1 and number >= len(found):
        raise DataError(f"the trace of {where.name} has {len(found)} sequences, and no {number}")
    return found[number if len(found) > 1 else 0]


def _patched(name: str, value: mx.array, found: Piece, places: np.ndarray) -> mx.array:
    """A value (L, ...) at positions (L,) with what was found at the same ones."""
    index = {int(place): number for number, place in enumerate(found[0])}
    which = np.array([index.get(int(place), -1) for place in places])
    if (which < 0).all():
        return value
    new = fitted(name, found[1], value.shape[-1])[mx.array(np.maximum(which, 0))]
    if new.shape != value.shape:
        raise DataError(f"the trace has {name} as {new.shape[1:]}, not {value.shape[1:]}")
    return mx.where(_wide(mx.array(which) >= 0, value), new.astype(value.dtype), value)


def _wide(mask: mx.array, value: mx.array) -> mx.array:
    """A mask of the first axes of a value, to be broadcast to it."""
    return mask.reshape(*mask.shape, *[1] * (value.ndim - mask.ndim))


def _among(numbers: mx.array, wanted: tuple[int, ...]) -> mx.array:
    """Which numbers are among the wanted ones, bool of their shape."""
    return (numbers[..., None] == mx.array(wanted, mx.int32)).any(-1)


def _misplaced(where: Where, place: str) -> DataError:
    return DataError(f"this change belongs at {place}, not at {where.name}")
