"""What was traced of a model's steps: of whole ones, and of blocks that follow each other."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import is_
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.layer.carried import Carried
from ds4mlx.model.fused import layers
from ds4mlx.model.fused.choice import hiding, unknown
from ds4mlx.model.fused.layers import Outputs, Passed, Sides, Stepped
from ds4mlx.model.module import changes
from ds4mlx.model.taps import Listener

# Traces of one `Traced`, one for each way in which sequences' buffers are large: of Flash about a megabyte
# each. With one more, all are made anew.
MOST = 64
# For so many sets of listeners there are traces at a time.
SETS = 4


class Traced:
    """Functions traced of a model, with the weights that they hold.

    modules: the blocks that go through their modules, of which there is no trace. compared: kinds of
    steps whose kernels were compared with plain operations, if they had to be. failed: whether MLX
    could not trace one of them.
    """

    def __init__(self, model: Stepped, listeners: tuple[Listener, ...]):
        """listeners: those who do the same to every call, whose work is traced too."""
        self.modules = unknown(model.layers) | (hiding(model.layers) if listeners else frozenset())
        self.compared: set[tuple[object, ...]] = set()
        self.failed = False
        self._changes, self._layers = changes(), list(model.layers)
        self._forget()

    def holds(self, model: Stepped) -> bool:
        """Whether no part of the model is another than it was."""
        return self._changes == changes() and all(map(is_, self._layers, model.layers))

    def whole(self, model: Stepped, sides: Sides) -> Outputs | None:
        """`layers.whole`; None where MLX cannot trace it."""
        return self._tried((), partial(layers.whole, model), sides)

    def through(
        self, model: Stepped, numbers: Sequence[int], carried: Carried, sides: Sides
    ) -> Passed | None:
        """`layers.through`; None where MLX cannot trace it."""
        return self._tried(tuple(numbers), partial(layers.through, model, numbers), carried, sides)

    def _tried(self, key: tuple[int, ...], function: Callable[..., Any], *given: Any) -> Any:
        if len(self._made) > MOST:
            self._forget()
        if key not in self._functions:
            self._functions[key] = mx.compile(partial(_noted, self._made, function))
        try:
            return self._functions[key](*given)
        except IndexError:  # so MLX says of some graphs of many groups of plain operations
            self.failed = True
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


def _noted(made: list[None], function: Callable[..., Any], *given: Any) -> Any:
    """What a function gives; a traced one is only called to be traced."""
    made.append(None)
    return function(*given)
