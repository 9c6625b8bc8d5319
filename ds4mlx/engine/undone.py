"""States go back to where they were when what was asked of the model cannot be computed.

A call of the model moves its states on before anything is evaluated.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from ds4mlx.state.decode_state import DecodeState, Stored


@dataclass(frozen=True)
class Place:
    """Where a state is: its length, and what going back to that length would not bring back.

    Records that a later length had no use for are among it, but none of the state's rows.
    """

    state: DecodeState
    length: int
    asked: frozenset[int]
    records: dict[int, mx.array]
    drafted: dict[tuple[int, int], mx.array]
    stored: Stored | None

    @classmethod
    def of(cls, state: DecodeState) -> "Place":
        """Where a state is now."""
        return cls(
            state,
            state.offset,
            state.boundaries.asked,
            state.records,
            state.drafts.records,
            state.stored,
        )

    def restore(self, record: mx.array | None = None) -> None:
        """Bring the state back here; by a record, bytes (n,), where its buffers may not reach."""
        state = self.state
        if state.offset == self.length:
            return
        if record is not None:
            state.load(record, self.length)
        state.rewind(self.length)
        state.boundaries.asked, state.records = self.asked, self.records
        state.drafts.records, state.stored = self.drafted, self.stored


@contextlib.contextmanager
def undone_on_failure(states: Iterable[DecodeState], far: bool = False) -> Iterator[None]:
    """If the block raises, the states get back to where they were at its beginning.

    far: the block may feed more tokens than the buffers can step back over.
    """
    places = [Place.of(state) for state in states]
    records = [p.state.record(p.length) if far and p.length else None for p in places]
    mx.eval(*[record for record in records if record is not None])
    try:
        yield
    except BaseException:
        for place, record in zip(places, records, strict=True):
            place.restore(record)
        raise
