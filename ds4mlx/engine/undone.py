"""States go back to where they were when what was asked of the model cannot be computed.

A call of the model moves its states on before anything is evaluated.
"""

import contextlib
from collections.abc import Iterable, Iterator

import mlx.core as mx

from ds4mlx.state.decode_state import DecodeState


@contextlib.contextmanager
def undone_on_failure(states: Iterable[DecodeState], far: bool = False) -> Iterator[None]:
    """If the block raises, the states get back the length that they had at its beginning.

    far: the block may feed more tokens than the buffers can step back over.
    """
    before = [(state, state.offset, state.boundaries.asked) for state in states]
    records = [state.record(length) if far and length else None for state, length, _ in before]
    mx.eval(*[record for record in records if record is not None])
    try:
        yield
    except BaseException:
        for (state, length, asked), record in zip(before, records, strict=True):
            if state.offset == length:
                continue
            if record is not None:
                state.load(record, length)
            state.rewind(length)
            state.boundaries.asked = asked
        raise
