"""Recording quantities of a running model: `model.trace`."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import mlx.core as mx
import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.model.batch import Batch, Span
from ds4mlx.model.model import Model
from ds4mlx.model.taps import listening
from ds4mlx.research.places import Calls, Layouts, chosen_positions
from ds4mlx.research.sites import fill, matching, sites

# The positions (L,) of a piece, and its values (L, ...).
Piece = tuple[np.ndarray, mx.array]


class Trace(Mapping[str, mx.array | list[mx.array]]):
    """What was recorded inside a block, by name; see `Model.trace`."""

    def __init__(self, model: Model, patterns: tuple[str, ...], positions: Iterable[int] | None):
        if not patterns:
            raise DataError("a trace needs the name of a quantity, or a pattern of names")
        self.names = matching(patterns, sites(model))
        self._recorder = _Recorder(model, self.names, positions)

    def __getitem__(self, name: str) -> mx.array | list[mx.array]:
        """Values (B, L, ...), or a list of (L, ...) where sequences differ in length."""
        every = [values for _, values in self.sequences(name)]
        apart = self._recorder.sites[name].of == "rows" and self._recorder.kept and len(every) > 1
        if apart or len({each.shape[0] for each in every}) > 1:
            return every
        return mx.stack(_filled(name, every))

    def sequences(self, name: str) -> list[Piece]:
        """Of each sequence the positions (L,) and the values (L, ...) recorded there.

        DataError: a name that the trace does not have, or calls with different numbers of sequences.
        """
        if name not in self.names:
            raise DataError(f"the trace has no {name!r}, but {_some(self.names)}")
        calls = self._recorder.calls.get(name, [])
        if not calls:
            raise DataError(f"no call inside the block made {name!r}")
        if len({len(call) for call in calls}) > 1:
            raise DataError(f"the calls that made {name!r} had different numbers of sequences")
        if self._recorder.sites[name].of == "rows":
            return calls[-1]
        return [_joined(name, pieces) for pieces in zip(*calls, strict=True)]

    def __contains__(self, name: object) -> bool:
        return name in self.names and name in self._recorder.calls

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if name in self._recorder.calls)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"Trace({_some(list(self))})"


def trace(
    model: Model, patterns: tuple[str, ...], positions: Iterable[int] | None
) -> contextlib.AbstractContextManager[Trace]:
    """See `Model.trace`."""
    return _recording(Trace(model, patterns, positions))


@contextlib.contextmanager
def _recording(made: Trace) -> Iterator[Trace]:
    with listening(made._recorder):
        yield made
    made._recorder.evaluate()


class _Recorder(Calls):
    """Keeps what each whole call has made of each name, by sequence. Replaces nothing."""

    def __init__(self, model: Model, names: list[str], positions: Iterable[int] | None):
        super().__init__(model, names, sites(model))
        self._asked, self._layouts = chosen_positions(positions), Layouts(model)
        self.calls: dict[str, list[list[Piece]]] = {}
        self.kept = False  # whether the sequences of the last call had states
        self._call: dict[str, list[list[Piece]]] = {}
        self._new: list[mx.array] = []

    def begins(self, batch: Batch) -> None:
        """What earlier calls made is evaluated, so that no graph outlives the next call."""
        super().begins(batch)
        self._call = {}
        self.evaluate()

    def take(self, name: str, value: mx.array, span: Span | None) -> mx.array:
        """The same value."""
        pieces = self._call.setdefault(name, [[] for _ in self._spans])
        for part in self.parts(name, self._layouts.values(name, value), span):
            for number, places, own in zip(part.sequences, part.positions, part.value, strict=True):
                asked = self._asked(places)
                if not asked.all() and self.sites[name].of == "tokens":
                    places, own = places[asked], own[mx.array(np.flatnonzero(asked))]
                pieces[number].append((places, own))
        return value

    def ends(self) -> None:
        """The call counts."""
        if self.batch is not None:
            self.kept = self.batch.kept
        for name, sequences in self._call.items():
            made = [_joined(name, pieces) for pieces in sequences]
            earlier = self.calls.setdefault(name, [])
            if self.sites[name].of == "rows":  # so far, those of earlier calls included
                earlier.clear()
            earlier.append(made)
            self._new += [values for _, values in made]
        self._call = {}
        super().ends()

    def evaluate(self) -> None:
        """Compute what was recorded."""
        mx.eval(self._new)
        self._new = []


def _joined(name: str, pieces: Iterable[Piece]) -> Piece:
    """Pieces of one sequence, one after the other."""
    places, values = zip(*pieces, strict=True)
    whole = values[0] if len(values) == 1 else mx.concatenate(_filled(name, values))
    return np.concatenate(places), whole


def _filled(name: str, values: Iterable[mx.array]) -> list[mx.array]:
    """Values whose last axes are as long as the longest."""
    made = list(values)
    most = max(each.shape[-1] for each in made)
    return [fitted(name, each, most) for each in made]


def fitted(name: str, values: mx.array, count: int) -> mx.array:
    """Values with a last axis of `count`: cut off, or filled up where it has no end of its own."""
    missing, filling = count - values.shape[-1], fill(name)
    if filling is None or missing == 0:
        return values
    if missing < 0:
        return values[..., :count]
    blank = mx.full((*values.shape[:-1], missing), filling, values.dtype)
    return mx.concatenate([values, blank], axis=-1)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
