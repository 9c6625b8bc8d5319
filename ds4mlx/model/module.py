"""The base of the model's modules, which counts the changes that are made to any of them.

What was traced of a model holds good as long as nothing was set, replaced or deleted in its modules.
"""

from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

_changes = 0


def changes() -> int:
    """How often something was set in any module so far; private attributes do not count."""
    return _changes


class Module(nn.Module):
    """A module of the model. Trainable are parameters of a float type, and no codes or tables of ids."""

    @staticmethod
    def trainable_parameter_filter(module: nn.Module, key: str, value: Any) -> bool:
        """Whether a parameter can be trained: it has a gradient, and is not frozen."""
        trainable = nn.Module.trainable_parameter_filter(module, key, value)
        coded = isinstance(value, mx.array) and not mx.issubdtype(value.dtype, mx.floating)
        return trainable and not coded

    def __setattr__(self, name: str, value: Any) -> None:
        _count(name)
        super().__setattr__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        _count(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        _count(name)
        super().__delitem__(name)

    def __ior__(self, others: Any) -> Self:
        _count()
        return super().__ior__(others)

    def pop(self, name: str, *default: Any) -> Any:
        """As of a dictionary, which a module is."""
        _count(name)
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Any]:
        """As of a dictionary."""
        _count()
        return super().popitem()

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As of a dictionary."""
        _count(name)
        return super().setdefault(name, default)

    def clear(self) -> None:
        """As of a dictionary."""
        _count()
        super().clear()


def _count(name: str = "") -> None:
    global _changes
    _changes += not name.startswith("_")
