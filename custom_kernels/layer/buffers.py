"""The arrays in which one layer of a decode state keeps its rows, as kernels take them.

The newest rows of every kind lie in tails, and all tails of a layer side by side in one array: what it
costs to launch a kernel grows with its arrays. A launch for several sequences has the arrays of each,
numbered, and finds those of a sequence by its number; it is written for 1, 2, 4 or 8 of them, and of
fewer the first stands for those that lack.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple, TypeVar

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch

Each = TypeVar("Each")

# Every tail begins at a multiple of so many words.
ALIGNED = 32


class TailForm(NamedTuple):
    """Rows of a tail and what a row is, (rows, ...), and their type; a row is of whole words."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def words(self) -> int:
        """Words of 32 bits of all rows."""
        return prod(self.shape) * self.dtype.size // 4

    @property
    def room(self) -> int:
        """Words from its beginning to the next tail's."""
        return -(-self.words // ALIGNED) * ALIGNED


class Tail(NamedTuple):
    """The newest rows of a kind: words of an array, uint32 (n,), from number `begin` on."""

    array: mx.array
    begin: int
    form: TailForm

    @property
    def value(self) -> mx.array:
        """The rows, as an array of their own shape and type."""
        own = self.array[self.begin : self.begin + self.form.words]
        return own.view(self.form.dtype).reshape(self.form.shape)

    @property
    def rows(self) -> int:
        """Rows that it has room for."""
        return self.form.shape[0]

    @property
    def row_words(self) -> int:
        """Words of a row."""
        return self.form.words // self.rows

    @property
    def share(self) -> float:
        """Its part of the array."""
        return self.form.words / self.array.size


class Recent(NamedTuple):
    """The last rows: `old` (KEEP, ...) come before the settled position, the tail's from it on."""

    old: mx.array
    tail: Tail

    @property
    def value(self) -> mx.array:
        """Both in one array."""
        return mx.concatenate([self.old, self.tail.value])


class Grown(NamedTuple):
    """All rows: those settled in `full` (capacity, elements), the newer ones in the tail."""

    full: mx.array
    tail: Tail

    @property
    def value(self) -> mx.array:
        """Both in one array, the buffer with all the room that it has."""
        return mx.concatenate([self.full, self.tail.value])


class Held(NamedTuple):
    """What a state holds of a layer: its window, and of each compressor projections and rows."""

    window: Recent
    poolings: Sequence[tuple[Recent, Grown]]

    @property
    def array(self) -> mx.array:
        """The array in which all its tails lie."""
        return self.window.tail.array

    @property
    def tails(self) -> list[Tail]:
        """All tails, in the order in which they lie."""
        return [self.window.tail, *(part.tail for pair in self.poolings for part in pair)]

    def after(self, array: mx.array) -> "Held":
        """The same with the tails in another array, where they lie as in this one."""
        window = self.window._replace(tail=self.window.tail._replace(array=array))
        pairs = []
        for recent, rows in self.poolings:
            projections = recent._replace(tail=recent.tail._replace(array=array))
            pairs.append((projections, rows._replace(tail=rows.tail._replace(array=array))))
        return Held(window, pairs)


def begins(forms: Sequence[TailForm]) -> list[int]:
    """Where tails begin that lie side by side, and where the last of them ends, in words."""
    return list(accumulate((form.room for form in forms), initial=0))


def joined(tails: Sequence[mx.array]) -> list[Tail]:
    """Tails side by side in one array, from an array of each."""
    forms = [TailForm(tail.shape, tail.dtype) for tail in tails]
    words = [mx.contiguous(tail).flatten().view(mx.uint32) for tail in tails]
    each = zip(words, forms, strict=True)
    array = mx.concatenate([mx.pad(own, (0, form.room - form.words)) for own, form in each])
    return [Tail(array, first, form) for first, form in zip(begins(forms), forms, strict=False)]


def filled(each: Sequence[Each]) -> list[Each]:
    """What sequences hold, as many as a launch is written for."""
    return [*each, *[each[0]] * (dispatch.made_up(len(each)) - len(each))]


def variant(kernel: str, many: int) -> str:
    """The name of a kernel that is written for so many."""
    return f"{kernel}_{many}" if many > 1 else kernel


def numbered(names: Sequence[str], many: int) -> list[str]:
    """The inputs of these names of each of so many sequences."""
    return [f"{name}{i}" for i in range(many) for name in names]


def picked(names: Sequence[str], type: str, many: int, number: str, kind: str = "const ") -> str:
    """Statements that name those of the inputs that are of the sequence of a number; kind "": of outputs."""
    pointer = f"{kind}device {type}*"
    lines = [f"{pointer} {name} = ({pointer}){name}0;" for name in names]
    for i in range(1, many):
        own = " ".join(f"{name} = ({pointer}){name}{i};" for name in names)
        lines.append(f"if ({number} == {i}) {{ {own} }}")
    return "\n".join(f"    {line}" for line in lines) + "\n"
