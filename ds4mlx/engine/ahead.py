"""A step that was submitted before anybody asked for it, and that its state does not show yet.

Its rows lie in the state's buffers, behind the end: so the state is the one before the step, whatever
becomes of it, and taking the step costs nothing. Nothing need be done to leave it out, as must be
done where the state or the model is no longer what it was.
"""

from collections.abc import Iterator
from dataclasses import replace
from operator import getitem, is_
from typing import Any

from ds4mlx.engine.undone import Place
from ds4mlx.model.model import Model
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
        self._after = [dict(vars(part)) for part in _parts(self._state)]
        place.restore()
        self._before = [list(vars(part).values()) for part in _parts(self._state)]

    def take(self) -> bool:
        """Have the state take the step, unless its rows have changed since; whether it has.

        Records and boundaries may have come and gone, and the state may have been stored, as long as
        the step has made the records that it would make now.
        """
        parts, boundaries = list(_parts(self._state)), self._state.boundaries
        for part, before in zip(parts, self._before, strict=True):
            if not all(map(is_, vars(part).values(), before)):
                return False
        asked = self._end in boundaries.asked and self._end not in self._made
        if asked or boundaries.spacing is not self._spacing:
            return False
        for part, after in zip(parts, self._after, strict=True):
            vars(part).update(after)
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
    """A model as it is seen at one time: its modules and weights, and who changes them steadily."""

    def __init__(self, model: Model):
        items = list(_items(model))
        self._holders, self._keys, self._values = zip(*items, strict=True)
        self._listeners = listeners()

    def same(self) -> bool:
        """Whether it is seen so now."""
        now = map(getitem, self._holders, self._keys)
        try:
            heard = steady() and listeners() == self._listeners
            return heard and all(map(is_, now, self._values))
        except (KeyError, IndexError):  # a part has been taken away
            return False


def _items(holder: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Everything in a module, (module or list, key, value), to its weights."""
    pairs = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in pairs:
        yield holder, key, value
        if isinstance(value, dict | list):
            yield from _items(value)


def _parts(state: DecodeState) -> Iterator[object]:
    """All rows of the main layers."""
    for layer in state.layers:
        yield layer.window
        for compressor in layer.compressors:
            yield from (compressor.recent, compressor.rows)
