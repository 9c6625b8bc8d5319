"""A prompt into a decode state, chunk by chunk."""

from collections.abc import Callable, Generator, Sequence

import mlx.core as mx

from ds4mlx.engine.interrupts import undivided
from ds4mlx.engine.machine import memory_told
from ds4mlx.engine.room import PREFILL_STEP
from ds4mlx.engine.undone import undone_on_failure
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState


def prefill(
    model: Model,
    ids: Sequence[int],
    cache: DecodeState,
    step: int = PREFILL_STEP,
    on_chunk: Callable[[int, int], None] | None = None,
    on_streams: Callable[[mx.array], None] | None = None,
) -> mx.array:
    """Feed `ids` to the state as `prefill_chunks` does; logits (1, vocab) after the last token.

    on_chunk: told (tokens done, tokens in all) after each chunk. on_streams: told each chunk's
    streams (1, L, n, D) after the last layer, when the state has taken it.
    """
    chunks = prefill_chunks(model, ids, cache, step, on_streams)
    while True:
        try:
            done = next(chunks)
        except StopIteration as end:
            return end.value
        if on_chunk is not None:
            on_chunk(done, len(ids))


def prefill_chunks(
    model: Model,
    ids: Sequence[int],
    cache: DecodeState,
    step: int = PREFILL_STEP,
    on_streams: Callable[[mx.array], None] | None = None,
) -> Generator[int, None, mx.array]:
    """Feed `ids` to the state in chunks; yields the tokens done after each, so that others may run.

    Returns the logits (1, vocab) after the last token.

    step: the most tokens of a chunk. Chunks end at multiples of `step` of the state's length, so that
    they do not depend on how much of a prompt the state held before. Only the last chunk runs the
    head, and each chunk's scratch memory is given back. A chunk that fails leaves the state as it was
    before that chunk, and so does a generator that is left. Raises OutOfMemory where the memory does
    not do for a chunk.
    """
    first = step - cache.offset % step
    logits = None
    for start in (0, *range(first, len(ids), step)):
        stop = min(len(ids), start + step if start else first)
        logits = prefill_chunk(model, ids[start:stop], cache, stop == len(ids), on_streams)
        yield stop
    return mx.zeros((1, 0)) if logits is None else logits


def prefill_chunk(
    model: Model,
    ids: Sequence[int],
    cache: DecodeState,
    last: bool,
    on_streams: Callable[[mx.array], None] | None = None,
) -> mx.array | None:
    """Feed one chunk to the state; logits (1, vocab) after it if it is the `last`, else None.

    Only then the head runs. A chunk that fails leaves the state as it was. Raises OutOfMemory where
    the memory does not do for it.
    """
    chunk = mx.array([list(ids)])
    what = f"{len(ids)} tokens of a prompt, after {cache.offset}"
    try:
        with memory_told(what), undivided(), undone_on_failure([cache], far=True):
            return model.read(chunk, cache, last, on_streams)
    finally:
        mx.clear_cache()
