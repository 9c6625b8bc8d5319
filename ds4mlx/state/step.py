"""What a call is about to change in a state: gathered while its graph is built, done at its end.

Until `commit` nothing of any state has changed, so that an error anywhere in a call, or Ctrl-C,
leaves all of them as they were.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

import mlx.core as mx


class Step:
    """One sequence's step from `offset` to `end` tokens, and the boundaries on its way."""

    def __init__(self, offset: int, length: int, boundaries: Sequence[int] = ()):
        self.offset, self.end = offset, offset + length
        self.boundaries = boundaries
        # What a record needs of a part of the state, by part and boundary.
        self.pieces: dict[tuple[object, int], mx.array] = {}
        # The changes, side by side: whose attribute of which name becomes what. No tuple of each is
        # made, which would be a few hundred a token for Python to collect.
        self.targets: list[object] = []
        self.names: list[str] = []
        self.values: list[object] = []
        self.arrays: list[mx.array] = []  # that the states will hold, for `mx.depends`
        # Begins to evaluate an array, and makes the changes so far, in a call that evaluates as it goes.
        self.submit: Callable[[mx.array], None] | None = None

    def change(self, target: object, **values: object) -> None:
        """Have attributes of `target` set when the step is done."""
        self.targets += [target] * len(values)
        self.names += values
        self.values += values.values()
        self.arrays += [value for value in values.values() if isinstance(value, mx.array)]

    def change_each(self, targets: Sequence[object], name: str, values: Sequence[object]) -> None:
        """Have one attribute of every target set when the step is done, to a value of its own."""
        self.targets += targets
        self.names += [name] * len(targets)
        self.values += values

    def clear(self) -> None:
        """Forget the changes, which were made."""
        for each in (self.targets, self.names, self.values, self.arrays):
            each.clear()

    def cut(self) -> list[mx.array]:
        """Have the pieces of what the changes are of not hold the memory that they were cut from."""
        targets = set(map(id, self.targets))
        own = [key for key in self.pieces if id(key[0]) in targets and self.pieces[key].size]
        self.pieces |= {key: mx.contiguous(self.pieces[key]) for key in own}
        return [self.pieces[key] for key in own]


def commit(steps: Sequence[Step]) -> None:
    """Make all changes of all steps, of which there is at least one.

    One call into C, in which no handler of a signal runs: Ctrl-C comes before or after.
    """
    sides = zip(*[(step.targets, step.names, step.values) for step in steps], strict=True)
    deque(map(setattr, *map(chain.from_iterable, sides)), maxlen=0)
