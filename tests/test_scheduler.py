"""Requests of several readers to one thread: who gets what, in which order, and how it ends."""

import asyncio

import mlx.core as mx
import numpy as np
import pytest
from scheduling import asked, check_kept, in_thread, settled, text_of, whole
from steering import Failing

from ds4mlx import DataError
from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.codes.tables import lut
from ds4mlx.engine import reading, steps
from ds4mlx.engine.request import (
    Busy,
    Ended,
    Failed,
    NoMemory,
    Piece,
    Started,
    Stopping,
    TooLong,
)
from ds4mlx.engine.scheduler import Scheduler

IDS = np.random.default_rng(4).integers(2, 288, 4000).tolist()


@pytest.fixture
def scheduler(small_model, small_tokenizer):
    """Makes schedulers of the smallest model; they are closed in the end."""
    made = []

    def make(started=True, **options):
        made.append(Scheduler(small_model, small_tokenizer, **options))
        if started:
            made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close(60)


def test_an_answer_has_a_start_pieces_and_an_end(scheduler):
    async def main():
        return await whole(await scheduler().submit(asked(IDS[:40], 8, logprobs=2)))

    events, text = asyncio.run(main())
    assert events[0] == Started(40, 0, "")
    assert all(isinstance(event, Piece) for event in events[1:-1]) and text
    assert (events[-1].reason, events[-1].completion_tokens) == ("length", 8)
    probs = [token for event in events[1:-1] for token in event.tokens]
    assert (
        len(probs) == 8 and b"".join(p.text_bytes for p in probs).decode(errors="replace") == text
    )
    assert all(p.logprob == p.top[0][1] >= p.top[1][1] and len(p.top) == 2 for p in probs)


def test_eight_at_once_say_what_each_says_alone(scheduler):
    requests = [asked(IDS[n : n + 20 + 10 * n], 9, stop=("~",)) for n in range(7)]
    requests.append(asked(IDS[:520], 9))

    async def main():
        together = scheduler(started=False, aligned=True)
        answers = [await together.submit(request) for request in requests]
        together.start()
        texts = await asyncio.gather(*map(whole, answers))
        return texts, [await text_of(together, request) for request in requests]

    together, alone = asyncio.run(main())
    assert [text for _, text in together] == alone and len(set(alone)) == 8


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of an eighth of their size, so that short prompts are long."""
    monkeypatch.setattr(reading, "SHARED_STEP", 64)
    monkeypatch.setattr(reading, "PREFILL_STEP", 256)


@pytest.mark.slow
def test_a_long_prompt_stops_nobody(scheduler):
    """With chunks as they are."""
    check_that_nobody_waits(scheduler, 4000)


def test_a_prompt_of_many_chunks_stops_nobody(scheduler, small_chunks):
    check_that_nobody_waits(scheduler, 500)


def check_that_nobody_waits(scheduler, length):
    """A running answer goes on between a prompt's chunks, and a short request passes it."""
    order = []

    async def read(name, answer, begun=None):
        async for event in answer:
            order.append((name, type(event)))
            if begun and isinstance(event, Started if name == "long" else Piece):
                begun.set()

    async def main():
        ours, going, begun = scheduler(), asyncio.Event(), asyncio.Event()
        stream = await ours.submit(asked(IDS[7:50], 1000))
        tasks = [asyncio.create_task(read("stream", stream, going))]
        await going.wait()
        long = await ours.submit(asked(IDS[-length:], 1))
        tasks.append(asyncio.create_task(read("long", long, begun)))
        await begun.wait()
        await read("short", await ours.submit(asked(IDS[50:100], 3)))
        await tasks[1]
        stream.cancel()
        await tasks[0]

    asyncio.run(main())
    first, last = order.index(("long", Started)), order.index(("long", Ended))
    between = order[first:last]
    assert between.count(("stream", Piece)) >= 7 and ("short", Ended) in between


def test_counting_waits_for_a_chunk_and_not_for_a_place(scheduler, small_chunks):
    async def main():
        ours = scheduler(max_batch=1, max_queue=0)
        long = await ours.submit(asked(IDS * 10, 1))
        assert isinstance(await anext(long), Started)
        counts = [await ours.count(IDS[:length]) for length in (9, 90, 3000)]
        assert counts == [9, 90, 3000] and long.unread == 0, "the prompt has been read before"
        long.cancel()

    asyncio.run(main())


def test_a_thought_is_ended_by_its_reader(talker):
    model, tokenizer = talker
    prompt = tokenizer.encode("<｜User｜>Why?<｜Assistant｜><think>")

    async def main(ours):
        ours.start()
        answer, text = await ours.submit(asked(prompt, 24, thinking="high")), ""
        async for event in answer:
            if isinstance(event, Piece):
                assert event.thinking == ("</think>" not in text)
                text += event.text
                answer.end_thinking()
        assert text.count("</think>") == 1
        assert 0 < event.reasoning_tokens < event.completion_tokens == 24
        await asyncio.to_thread(ours.close, 60)

    asyncio.run(main(Scheduler(model, tokenizer)))


def test_readers_whose_event_loop_has_closed_are_given_up(scheduler):
    ours = scheduler(max_batch=1, max_queue=1)

    async def leave():
        await anext(await ours.submit(asked(IDS[:50], 10_000)))
        await ours.submit(asked(IDS[:60], 10_000))

    asyncio.run(leave())
    settled(ours)
    assert ours.status().counters["cancelled"] == 2
    assert asyncio.run(text_of(ours, asked(IDS[:50], 3)))


def test_what_cannot_be_is_refused_before_anything_is_done(scheduler):
    async def main():
        ours = scheduler(started=False, max_batch=1, max_queue=1, context=100)
        for bad in ([], [5, -1], [999]):
            with pytest.raises(DataError):
                await ours.submit(asked(bad))
        with pytest.raises(DataError, match="stop string is empty"):
            await ours.submit(asked([5], stop=("",)))
        with pytest.raises(TooLong) as error:
            await ours.submit(asked(IDS[:100]))
        assert (error.value.tokens, error.value.most) == (100, 99)
        answers = [await ours.submit(asked(IDS[:99], None)) for _ in range(2)]
        with pytest.raises(Busy) as error:
            await ours.submit(asked(IDS[:9]))
        assert error.value.retry_after >= 1
        ours.start()
        for events, _ in [await whole(answer) for answer in answers]:
            assert events[-1].reason == "context" and events[-1].completion_tokens == 1
        assert (await whole(await ours.submit(asked(IDS[:100], 0))))[0][-1].reason == "length"

    asyncio.run(main())


def test_constants_of_kernels_are_good_for_any_thread(scheduler):
    """Whoever loads a model asks for them first."""
    kept = [lut(name, eight) for name in PACKINGS for eight in (False, True)]
    ours = scheduler()
    in_thread(ours, lambda: mx.eval([table + 0 for table in kept]))


def test_closing_ends_all_and_refuses_more(scheduler):
    async def main():
        ours = scheduler(started=False, max_batch=1)
        answers = [await ours.submit(asked(IDS[:50], 10_000)) for _ in range(3)]
        ours.start()
        await answers[0].__anext__()
        await asyncio.to_thread(ours.close, 60)
        with pytest.raises(Stopping):
            await ours.submit(asked([5]))
        for answer in answers:
            events, _ = await whole(answer)
            assert isinstance(events[-1], Failed) and isinstance(events[-1].error, Stopping)

    asyncio.run(main())


def test_a_fault_in_the_bookkeeping_ends_requests_and_not_the_thread(scheduler, monkeypatch):
    """Nor does it leave anybody waiting for a count."""
    ours = scheduler(started=False)
    prefixes = ours.worker.prefixes
    rest, faults = prefixes.rest, iter([1, 1])

    def failing(kept):
        if next(faults, None):
            raise RuntimeError("a fault")
        rest(kept)

    async def main():
        monkeypatch.setattr(prefixes, "rest", failing)
        answers = [await ours.submit(asked(IDS[n : n + 50], n)) for n in (5, 200)]
        ours.start()
        (one, _), (other, _) = [await whole(answer) for answer in answers]
        assert isinstance(one[-1], Ended) and "a fault" in str(other[-1].error)
        assert await text_of(ours, asked(IDS[:60], 5))
        monkeypatch.setattr(ours.worker, "_plan", lambda ids: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await ours.count(IDS[:60])

    asyncio.run(main())


class Broken(Failing):
    """A sampler that fails from its n-th draw on."""

    def __call__(self, logits, key):
        try:
            return super().__call__(logits, key)
        finally:
            self.left = max(self.left, 1)


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("sampler", [Failing, Broken])
def test_a_sampler_that_fails_ends_its_request_only(scheduler, sampler, last):
    """And if it fails once, in a step, not even that."""

    async def main():
        ours = scheduler(started=False)
        want = await ours.submit(asked(IDS[:60], 9))
        bad = await ours.submit(asked(IDS[:70], 9, sampler=sampler(last)))
        other = await ours.submit(asked(IDS[:80], 9))
        ours.start()
        (_, text), (events, same), (_, third) = [await whole(a) for a in (want, bad, other)]
        if sampler is Broken or last == 1:
            assert isinstance(events[-1], Failed) and "out of memory" in str(events[-1].error)
        else:
            assert same == await text_of(ours, asked(IDS[:70], 9))
        assert text == await text_of(ours, asked(IDS[:60], 9))
        assert third == await text_of(ours, asked(IDS[:80], 9))

    asyncio.run(main())


def test_cancelling_frees_the_place_wherever_the_request_is(scheduler, small_chunks):
    async def main():
        ours = scheduler(started=False, max_batch=1, max_queue=2)
        answers = [await ours.submit(asked(ids, 10_000)) for ids in (IDS[:50], IDS[:600], IDS[:60])]
        answers[2].cancel()  # it waits
        ours.start()
        assert [event async for event in answers[2]] == []
        decoding, reading = answers[:2]
        while not isinstance(await decoding.__anext__(), Piece):
            pass
        decoding.cancel()
        assert isinstance(await reading.__anext__(), Started)
        reading.cancel()
        texts = [await text_of(ours, asked(IDS[:60], 5)) for _ in range(4)]
        assert check_kept(ours) > 1
        settled(ours)
        assert ours.status().counters["cancelled"] == 3
        return texts

    texts = asyncio.run(main())
    assert len(set(texts)) == 1


def test_a_reader_that_stops_pauses_its_answer_only(scheduler, monkeypatch):
    monkeypatch.setattr(steps, "MOST_UNREAD", 4)
    monkeypatch.setattr(steps, "FEW_UNREAD", 2)

    async def main():
        ours = scheduler()
        slow = await ours.submit(asked(IDS[:50], 14))
        other = await text_of(ours, asked(IDS[:60], 14))
        assert slow.unread <= 8 and ours.status().running == 1
        events, text = await whole(slow)
        assert isinstance(events[-1], Ended) and text == await text_of(ours, asked(IDS[:50], 14))
        assert other == await text_of(ours, asked(IDS[:60], 14))

    asyncio.run(main())


def test_a_reader_that_does_not_come_back_is_dropped(scheduler, monkeypatch):
    monkeypatch.setattr(steps, "MOST_UNREAD", 6)
    monkeypatch.setattr(steps, "FEW_UNREAD", 3)
    monkeypatch.setattr(steps, "PATIENCE", 0.0)

    async def main():
        ours = scheduler()
        gone = await ours.submit(asked(IDS[:50], 400))
        while not ours.status().counters.get("failed"):
            await text_of(ours, asked(IDS[:60], 3))
        events, _ = await whole(gone)
        assert isinstance(events[-1], Failed) and "not read" in str(events[-1].error)
        assert len(events) < 20

    asyncio.run(main())


def test_states_that_do_not_fit_are_refused_or_wait(scheduler):
    async def main():
        small = scheduler(memory=1000)
        with pytest.raises(NoMemory, match="GB") as error:
            await small.submit(asked(IDS[:50]))
        need = error.value.needed
        assert need > error.value.available == 1000
        ours = scheduler(started=False, memory=need * 3 // 2)
        answers = [await ours.submit(asked(IDS[n : n + 50])) for n in range(3)]
        ours.start()
        order = []
        for answer in answers:
            events, _ = await whole(answer)
            order.append(events[-1].reason)
            assert ours.status().running <= 1
        assert order == ["length"] * 3

    asyncio.run(main())
