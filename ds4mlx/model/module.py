"""The base of the model's modules, which counts the changes that are made to any of them.

What was traced of a model holds good as long as nothing was set, replaced or deleted in its modules.
"""

from typing import Any

import mlx.nn as nn

_changes = 0


def changes() -> int:
    """How often something was set in any module so far; private attributes do not count."""
    return _changes


class Module(nn.Module):
    """A module of the model."""

    def __setattr__(self, name: str, value: Any) -> None:
        _count(name)
        super().__setattr__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        _count(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        _count(name)
        super().__delitem__(name)


def _count(name: str) -> None:
    global _changes
    _changes += not name.startswith("_")
