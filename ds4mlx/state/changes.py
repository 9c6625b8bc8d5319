"""What is done to a model while it makes states, so that no state is taken for one made otherwise.

A change has a name, and equal names stand for equal changes; one that may be anything has none.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

# In the place of a name: nothing made under such a change is ever met again.
NAMELESS = "nameless"


@dataclass(frozen=True, eq=False)
class _Change:
    """One block's change, so that its end takes away no other of the same name."""

    name: str


_made: ContextVar[tuple[_Change, ...]] = ContextVar("changes", default=())


@contextlib.contextmanager
def changing(name: str) -> Iterator[None]:
    """Inside the block this thread's models are changed, by what this names and by what was before.

    Blocks may end in any order.
    """
    own = _Change(name)
    _made.set((*_made.get(), own))
    try:
        yield
    finally:
        _made.set(tuple(each for each in _made.get() if each is not own))


def changes() -> str:
    """The names of the changes in force, in their order; "" where there are none."""
    names = [change.name for change in _made.get()]
    return NAMELESS if NAMELESS in names else " ".join(names)
