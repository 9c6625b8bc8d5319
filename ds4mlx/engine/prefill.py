"""A prompt into a decode state, chunk by chunk."""

from collections.abc import Callable, Generator, Sequence

import mlx.core as mx

from ds4mlx.engine.interrupts import undivided
from ds4mlx.engine.undone import undone_on_failure
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState

PREFILL_STEP = 2048


def prefill(
    model: Model,
    ids: Sequence[int],
    cache: DecodeState,
    step: int = PREFILL_STEP,
    on_chunk: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Feed `ids` to the state as `prefill_chunks` does; logits (1, vocab) after the last token.

    on_chunk: told (tokens done, tokens in all) after each chunk.
    """
    chunks = prefill_chunks(model, ids, cache, step)
    while True:
        try:
            done = next(chunks)
        except StopIteration as end:
            return end.value
        if on_chunk is not None:
            on_chunk(done, len(ids))


def prefill_chunks(
    model: Model, ids: Sequence[int], cache: DecodeState, step: int = PREFILL_STEP
) -> Generator[int, None, mx.array]:
    """Feed `ids` to the state in chunks; yields the tokens done after each, so that others may run.

    Returns the logits (1, vocab) after the last token.

    Chunks end at multiples of `step` of the state's length, so that they do not depend on how much
    of a prompt the state held before. Only the last chunk runs the head, and each chunk's scratch
    memory is given back. A chunk that fails leaves the state as it was before that chunk, and so
    does a generator that is left.
    """
    logits = mx.zeros((1, 0))
    first = step - cache.offset % step
    for start in (0, *range(first, len(ids), step)):
        stop = min(len(ids), start + step if start else first)
        chunk = mx.array([list(ids[start:stop])])
        with undivided(), undone_on_failure([cache], far=True):
            if stop < len(ids):
                mx.eval(model.streams(chunk, cache)[:, -1:])
            else:
                logits = model.last_logits(chunk, cache)
                mx.eval(logits)
        mx.clear_cache()
        yield stop
    return logits
