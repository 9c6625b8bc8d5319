"""The arrays in which one layer of a decode state keeps its rows, as kernels take them.

A launch for several sequences has such arrays of each, numbered, and finds those of a sequence by its
number; it is written for 1, 2, 4 or 8 of them, and of fewer the first stands for those that lack.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch

Held = TypeVar("Held")


class Recent(NamedTuple):
    """The last rows: `old` (KEEP, ...) come before the settled position, `tail` (SPAN, ...) from it on."""

    old: mx.array
    tail: mx.array


class Grown(NamedTuple):
    """All rows: those settled in `full` (capacity, elements), the newer ones in `tail` (TAIL, elements)."""

    full: mx.array
    tail: mx.array


def filled(each: Sequence[Held]) -> list[Held]:
    """What sequences hold, as many as a launch is written for."""
    return [*each, *[each[0]] * (dispatch.made_up(len(each)) - len(each))]


def variant(kernel: str, many: int) -> str:
    """The name of a kernel that is written for so many."""
    return f"{kernel}_{many}" if many > 1 else kernel


def numbered(names: Sequence[str], many: int) -> list[str]:
    """The inputs of these names of each of so many sequences."""
    return [f"{name}{i}" for i in range(many) for name in names]


def picked(names: Sequence[str], type: str, many: int, number: str) -> str:
    """Statements that name those of the inputs that are of the sequence of a number."""
    lines = [f"const device {type}* {name} = (const device {type}*){name}0;" for name in names]
    for i in range(1, many):
        own = " ".join(f"{name} = (const device {type}*){name}{i};" for name in names)
        lines.append(f"if ({number} == {i}) {{ {own} }}")
    return "\n".join(f"    {line}" for line in lines) + "\n"
