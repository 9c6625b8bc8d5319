"""Classic mistakes, one function each, seeded into the model by monkeypatching.

A fault takes pytest's `monkeypatch` and the model; its docstring is its name in reports.
"""

from faults import attending, mixture, positions, rows, storage, streams
from faults.listing import FAULTS, STORAGE_FAULTS

__all__ = [
    "FAULTS",
    "STORAGE_FAULTS",
    "attending",
    "mixture",
    "positions",
    "rows",
    "storage",
    "streams",
]
