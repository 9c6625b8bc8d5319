"""A step that was submitted before anybody asked for it, and that its state does not show yet.

Its rows lie in the state's buffers, behind the end: so the state is the one before the step, whatever
becomes of it, and taking the step costs nothing. Nothing need be done to leave it out, as must be
done where the state or the model is no longer what it was.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from operator import is_
from typing import Any

from ds4mlx.engine.undone import Place
from ds4mlx.model.model import Model
from ds4mlx.model.module import Module, changes
from ds4mlx.model.taps import listeners, steady
from ds4mlx.state.decode_state import DecodeState


class Ahead:
    """The last step of a state, from `place` on; making it brings the state back there."""

    def __init__(self, place: Place):
        self._state, boundaries = place.state, place.state.boundaries
        self._end, self._spacing = self._state.offset, boundaries.spacing
        made, kept = self._state.records, place.records
        self._made = {p: record for p, record in made.items() if p not in kept}
        self._dropped = kept.keys() - made.keys()
        # Once a token for some hundred parts: so it is done by few statements.
        fields = self._state.parts.fields
        self._after = list(map(dict.copy, fields))
        place.restore()
        self._before = _values(map(dict.values, fields))

    def take(self) -> bool:
        """Have the state take the step, unless its rows have changed since; whether it has.

        Records and boundaries may have come and gone, and the state may have been stored, as long as
        the step has made the records that it would make now.
        """
        fields, boundaries = self._state.parts.fields, self._state.boundaries
        now = _values(map(dict.values, fields))
        if len(now) != len(self._before) or not all(map(is_, now, self._before)):
            return False
        asked = self._end in boundaries.asked and self._end not in self._made
        if asked or boundaries.spacing is not self._spacing:
            return False
        for own, after in zip(fields, self._after, strict=True):
            own.update(after)
        kept = {p: r for p, r in self._state.records.items() if p not in self._dropped}
        self._state.records = kept | self._made
        boundaries.asked -= self._made.keys()
        return True


def stepped_back(state: DecodeState, tokens: int) -> list[Ahead]:
    """Bring a state back to `tokens` tokens; the steps forward from there, of one each, last first.

    No boundary may lie between.
    """
    steps = []
    while state.offset > tokens:
        steps.append(Ahead(replace(Place.of(state), length=state.offset - 1)))
    return steps


class Seen:
    """A model as it is seen at one time: its modules and weights, and who changes them steadily.

    Private attributes of modules do not count.
    """

    def __init__(self, model: Model):
        self._changes, self._listeners = changes(), listeners()
        # Modules count what is set in them; what else holds parts does not.
        self._holders = [each for each in _holders(model) if not isinstance(each, Module)]
        self._held = _values(map(_parts_of, self._holders))

    def same(self) -> bool:
        """Whether it is seen so now."""
        if self._changes != changes() or not steady() or listeners() != self._listeners:
            return False
        now = _values(map(_parts_of, self._holders))
        return len(now) == len(self._held) and all(map(is_, now, self._held))


def _holders(holder: Any) -> Iterator[Any]:
    """A module, and everything in it that holds parts: modules, lists and dictionaries."""
    yield holder
    for value in _parts_of(holder):
        if isinstance(value, dict | list):
            yield from _holders(value)


def _parts_of(holder: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder


def _values(each: Iterable[Iterable[Any]]) -> list[Any]:
    """What is in some things, one after the other."""
    return list(chain.from_iterable(each))
