"""What a call is about to change in a state: gathered while its graph is built, done at its end.

Until `commit` nothing of any state has changed, so that an error anywhere in a call, or Ctrl-C,
leaves all of them as they were.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import mlx.core as mx


class Step:
    """One sequence's step from `offset` to `end` tokens, and the boundaries on its way."""

    def __init__(self, offset: int, length: int, boundaries: Sequence[int] = ()):
        self.offset, self.end = offset, offset + length
        self.boundaries = boundaries
        # What a record needs of a part of the state, by part and boundary.
        self.pieces: dict[tuple[object, int], mx.array] = {}
        self.changes: list[tuple[object, str, object]] = []
        self.arrays: list[mx.array] = []  # that the states will hold, for `mx.depends`
        # Begins to evaluate an array, and makes the changes so far, in a call that evaluates as it goes.
        self.submit: Callable[[mx.array], None] | None = None

    def change(self, target: object, **values: object) -> None:
        """Have attributes of `target` set when the step is done."""
        self.changes += [(target, name, value) for name, value in values.items()]
        self.arrays += [value for value in values.values() if isinstance(value, mx.array)]

    def clear(self) -> None:
        """Forget the changes, which were made."""
        self.changes.clear()
        self.arrays.clear()

    def cut(self) -> list[mx.array]:
        """Have the pieces of what the changes are of not hold the memory that they were cut from."""
        targets = {id(target) for target, _, _ in self.changes}
        own = [key for key in self.pieces if id(key[0]) in targets and self.pieces[key].size]
        self.pieces |= {key: mx.contiguous(self.pieces[key]) for key in own}
        return [self.pieces[key] for key in own]


def commit(steps: Iterable[Step]) -> None:
    """Make all changes of all steps.

    One call into C, in which no handler of a signal runs: Ctrl-C comes before or after.
    """
    changes = list(chain.from_iterable(step.changes for step in steps))
    if changes:
        deque(map(setattr, *zip(*changes, strict=True)), maxlen=0)
