"""What tests of the scheduler share: requests, whole answers, and work done in its thread."""

from concurrent.futures import Future

import mlx.core as mx
import numpy as np

from ds4mlx.chat.segments import Prompt
from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.request import Ended, Piece, Request, Started
from ds4mlx.engine.sampling import Sampler

GREEDY = Sampler(temperature=0)


def asked(ids, count=8, **options):
    prompt = ids if isinstance(ids, Prompt) else list(ids)
    return Request(prompt, count, **{"sampler": GREEDY, **options})


async def whole(answer):
    """All events of an answer, and its text."""
    events = [event async for event in answer]
    return events, "".join(e.text for e in events if isinstance(e, Piece))


async def text_of(scheduler, request):
    events, text = await whole(await scheduler.submit(request))
    assert isinstance(events[0], Started) and isinstance(events[-1], Ended), events
    return text


async def drawn(scheduler, ids, count=8, **options):
    """The `Started` of an answer, and the tokens that were drawn."""
    request = asked(ids, count, logprobs=0, **options)
    events, _ = await whole(await scheduler.submit(request))
    assert isinstance(events[-1], Ended), events
    return events[0], [token.token for e in events[1:-1] for token in e.tokens]


def in_thread(scheduler, act):
    """What a function gives that runs in the scheduler's thread, between two turns."""
    future = Future()

    def run():
        try:
            future.set_result(act())
        except (Exception, AssertionError) as error:  # noqa: BLE001 - raised in the test
            future.set_exception(error)

    scheduler.worker.commands.put(run)
    return future.result(60)


def check_kept(scheduler):
    """Every kept state goes on as a fresh one with the same tokens does; how many there are."""
    prefixes = scheduler.worker.prefixes

    def check():
        model = prefixes.model
        for kept in prefixes.kept:
            fresh, fork = model.make_cache(), model.make_cache()
            fork.share(kept.state)
            tokens = kept.tokens[: kept.state.offset]
            assert fork.offset == len(tokens)
            prefill(model, tokens, fresh, 512)
            ours, theirs = (np.array(model.last_logits([[7, 8]], [s])) for s in (fork, fresh))
            np.testing.assert_allclose(ours, theirs, atol=2e-3)
            assert kept.state.offset == len(tokens)
        return len(prefixes.kept)

    count = in_thread(scheduler, check)
    mx.clear_cache()
    return count


def settled(scheduler):
    """Have everything happen that has been asked for."""
    while scheduler.status().running or scheduler.status().waiting:
        in_thread(scheduler, lambda: None)
