"""What is done to a model while it makes states, so that no state is taken for one made otherwise.

A change has a name, and equal names stand for equal changes; one that may be anything has none.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

# In the place of a name: nothing made under such a change is ever met again.
NAMELESS = "nameless"

_names: ContextVar[tuple[str, ...]] = ContextVar("changes", default=())


@contextlib.contextmanager
def changing(name: str) -> Iterator[None]:
    """Inside the block this thread's models are changed, by what this names and by what was before."""
    before = _names.set((*_names.get(), name))
    try:
        yield
    finally:
        _names.reset(before)


def changes() -> str:
    """The names of the changes in force, in their order; "" where there are none."""
    names = _names.get()
    return NAMELESS if NAMELESS in names else " ".join(names)
