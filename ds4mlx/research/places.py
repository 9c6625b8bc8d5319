"""Which token, or which row, each part of a heard quantity belongs to."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.model.batch import Batch, Span
from ds4mlx.model.model import Model
from ds4mlx.model.taps import Listener
from ds4mlx.research.sites import Site
from ds4mlx.state.row_forms import RowForm


@dataclass(frozen=True)
class Where:
    """What a value (B, L, ...) given to an intervention is, and of which tokens.

    positions: absolute, int (B, L); of a compressed row that of its last token, from which on it is
    seen. sequence: int (B,), the numbers of the sequences in the call. expert_count: how many routed
    experts a layer has. experts: int (B, L, k), those whose weights or products the value has.
    rows: int (B, L or 1, K), the numbers of the compressed rows, or positions of the raw ones, that
    the value's last axis is about; -1 for none.
    """

    name: str
    positions: mx.array
    sequence: mx.array
    expert_count: int
    experts: mx.array | None = None
    rows: mx.array | None = None


@dataclass(frozen=True)
class Part:
    """A part of a heard quantity: (B, L, ...) of some sequences, and their positions (B, L)."""

    sequences: list[int]
    positions: np.ndarray
    value: mx.array


class Calls(Listener):
    """Hears the calls of one model, and knows which tokens a quantity is of."""

    def __init__(self, model: Model, names: Collection[str], sites: dict[str, Site]):
        self.model, self.names, self.sites = model, frozenset(names), sites
        self.batch: Batch | None = None  # of the call that goes on
        self._shown: dict[tuple[str, int], int] = {}  # queries so far, by name and sequence

    def begins(self, batch: Batch) -> None:
        """Listen if it is a call of this model, whose tables no other has."""
        self.batch = batch if batch.tables is self.model._rotary else None
        self._shown = {}

    def ends(self) -> None:
        """What is computed between two calls is no part of either."""
        self.batch = None

    def wants(self, name: str) -> bool:
        """Whether it is one of the names."""
        return self.batch is not None and name in self.names

    @property
    def _spans(self) -> list[Span]:
        assert self.batch is not None
        return self.batch.spans

    def parts(self, name: str, value: mx.array, span: Span | None) -> list[Part]:
        """The value by sequences: all together where they are equally long."""
        if span is not None:
            return [self._of_one(name, value, span)]
        places = [np.arange(span.step.offset, span.step.end) for span in self._spans]
        if len(value) == len(places):  # of the last token of each, where the head has no other
            places = [each[-1:] for each in places]
        everyone = list(range(len(places)))
        if len({len(each) for each in places}) == 1:
            return [Part(everyone, np.stack(places), mx.unflatten(value, 0, (len(places), -1)))]
        edges = np.cumsum([len(each) for each in places])[:-1].tolist()
        pieces = zip(everyone, places, mx.split(value, edges), strict=True)
        return [Part([number], each[None], piece[None]) for number, each, piece in pieces]

    def _of_one(self, name: str, value: mx.array, span: Span) -> Part:
        """Of one sequence: its rows so far, or its next queries."""
        number = next(i for i, each in enumerate(self._spans) if each is span)
        if self.sites[name].of == "rows":
            ratio = self.model.args.ratio(int(name.split(".")[1]))
            positions = ratio * (1 + np.arange(len(value))) - 1
        else:
            start = span.step.offset + self._shown.get((name, number), 0)
            positions = np.arange(start, start + len(value))
            self._shown[name, number] = self._shown.get((name, number), 0) + len(value)
        return Part([number], positions[None], value[None])


class Layouts:
    """The rows of a model's states as values, in the activation type, and back."""

    def __init__(self, model: Model):
        self._form, self._dtype = model.state_form, model.dtype

    def values(self, name: str, value: mx.array) -> mx.array:
        """What a heard quantity stands for: rows as attention reads them, all else as it is."""
        form = self._of(name)
        if form is None:
            return value.astype(mx.int32) if name.endswith("router.experts") else value
        held = form.pack(value) if name.endswith("attn.window_rows") else value
        if held.dtype != form.dtype or not len(held):  # not laid out
            return held if len(held) else mx.zeros((0, form.width), self._dtype)
        return form.unpack(held).astype(self._dtype)

    def laid_out(self, name: str, rows: mx.array, like: mx.array) -> mx.array:
        """Values as the model goes on with them, as it does with `like`."""
        form = self._of(name)
        packed = form is not None and like.dtype == form.dtype != rows.dtype
        return form.pack(rows) if form is not None and packed else rows

    def _of(self, name: str) -> RowForm | None:
        if name.endswith(("attn.window_rows", "attn.rows")):
            return self._form.kv
        return self._form.index if name.endswith("attn.indexer.rows") else None


def chosen_positions(positions: Iterable[int] | int | None) -> Callable[[np.ndarray], np.ndarray]:
    """Which of some positions are asked for, bool of their shape. DataError: not positions."""
    if positions is None:
        return lambda each: np.ones(each.shape, bool)
    try:
        listed = positions if isinstance(positions, int | mx.array) else list(positions)
        asked = np.atleast_1d(np.array(listed))
    except (TypeError, ValueError):
        raise DataError(f"positions must be whole numbers, not {positions!r}") from None
    if asked.size and (asked.dtype.kind not in "iu" or asked.min() < 0):
        raise DataError(f"positions must be whole numbers from 0 on, not {asked.tolist()}")
    return lambda each: np.isin(each, asked)
