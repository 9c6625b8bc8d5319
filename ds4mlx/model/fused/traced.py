"""What was traced of a model's steps: of whole ones, and of blocks that follow each other."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import is_
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.layer.carried import Carried
from ds4mlx.model.fused import layers
from ds4mlx.model.fused.choice import hiding, unknown
from ds4mlx.model.fused.layers import Arrays, Stepped
from ds4mlx.model.fused.sequences import Places
from ds4mlx.model.module import changes
from ds4mlx.model.taps import Listener

# Traces of one `Traced`, one for each way in which sequences' buffers are large: of Flash about a megabyte
# each. With one more, all are made anew.
MOST = 64
# For so many sets of listeners there are traces at a time.
SETS = 4
# Logits (B, vocab), streams (B, n, D), and of each sequence every layer's new tails.
Outputs = tuple[mx.array, mx.array, list[list[mx.array]]]
# What is carried on, and the same tails.
Passed = tuple[Carried, list[list[mx.array]]]


class Traced:
    """Functions traced of a model, with the weights that they hold.

    modules: the blocks that go through their modules, of which there is no trace. compared: kinds of
    steps whose kernels were compared with plain operations, if they had to be.
    """

    def __init__(self, model: Stepped, listeners: tuple[Listener, ...]):
        """listeners: those who do the same to every call, whose work is traced too."""
        self.modules = unknown(model.layers) | (hiding(model.layers) if listeners else frozenset())
        self.compared: set[tuple[object, ...]] = set()
        self._changes, self._layers = changes(), list(model.layers)
        self._failed = False
        self._forget()

    def holds(self, model: Stepped) -> bool:
        """Whether no part of the model is another than it was."""
        return self._changes == changes() and all(map(is_, self._layers, model.layers))

    @property
    def failed(self) -> bool:
        """Whether MLX could not trace one of them."""
        return self._failed

    def step(self, model: Stepped, *sides: Any) -> Outputs | None:
        """The step as a function of arrays, see `_step`; None where MLX cannot trace it."""
        return self._tried((), partial(_step, model), sides)

    def through(self, model: Stepped, numbers: Sequence[int], *sides: Any) -> Passed | None:
        """Some of its blocks in turn, see `_through`; None where MLX cannot trace them."""
        return self._tried(tuple(numbers), partial(_through, model, numbers), sides)

    def _tried(self, key: tuple[int, ...], function: Callable[..., Any], sides: Sequence) -> Any:
        if len(self._made) > MOST:
            self._forget()
        if key not in self._functions:
            self._functions[key] = mx.compile(partial(_noted, self._made, function))
        try:
            return self._functions[key](*sides)
        except IndexError:  # so MLX says of some graphs of many groups of plain operations
            self._failed = True
            return None

    def _forget(self) -> None:
        """Begin anew with tracing: MLX keeps all that was traced of a function as long as the function."""
        self._functions: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._made: list[None] = []  # an entry for each trace


class Traces:
    """What was traced of a model for each of the last sets of listeners; several threads may ask."""

    def __init__(self) -> None:
        self._sets: dict[tuple[Listener, ...], Traced] = {}

    def of(self, model: Stepped, listeners: tuple[Listener, ...]) -> Traced:
        """That of the model as it is now; nothing is kept of what it was."""
        found = self._sets.get(listeners)
        if found is None or not found.holds(model):
            found = Traced(model, listeners)
            others = [each for each in self._sets.items() if each[1].holds(model)]
            self._sets = dict([*others[1 - SETS :], (listeners, found)])
        return found


def _noted(made: list[None], function: Callable[..., Any], *sides: Any) -> Any:
    """What a function gives; a traced one is only called to be traced."""
    made.append(None)
    return function(*sides)


def _step(
    model: Stepped,
    ids: mx.array,
    places: Places,
    held: Arrays,
    selects: Sequence[int],
    ways: Sequence[int],
) -> Outputs:
    """A whole step. `ways`: what else decides which launches there are."""
    numbers, carried = range(len(model.layers)), layers.begin(model, ids)
    carried, tails = layers.through(model, numbers, carried, ids, places, held, selects)
    return *layers.ended(model, carried), tails


def _through(
    model: Stepped,
    numbers: Sequence[int],
    carried: Carried,
    ids: mx.array,
    places: Places,
    held: Arrays,
    selects: Sequence[int],
    ways: Sequence[int],
) -> Passed:
    """`layers.through` of a part of a step; `ways` as of a whole one."""
    return layers.through(model, numbers, carried, ids, places, held, selects)


def untraced(model: Stepped, sides: Sequence[Any]) -> Outputs:
    """What `Traced.step` would trace."""
    return _step(model, *sides)
