"""What a prompt finds already read: in memory, being read by another, and in a store."""

import asyncio
import gc
import logging

import mlx.core as mx
import numpy as np
import pytest
from ahead import NEAR
from scheduling import asked, check_kept, drawn, in_thread, settled, text_of, whole
from steering import Failing

from ds4mlx import KVStore
from ds4mlx.chat import encode_segments
from ds4mlx.engine import prefixes
from ds4mlx.engine.request import Ended, Failed, Piece, Started
from ds4mlx.engine.scheduler import Scheduler
from ds4mlx.store.policy import Policy

IDS = np.random.default_rng(5).integers(2, 288, 3000).tolist()
OTHER = np.random.default_rng(6).integers(2, 288, 3000).tolist()


@pytest.fixture
def schedulers():
    """Makes schedulers, each closed in the end, and after it its store."""
    made, stores = [], []

    def make(model, tokenizer, started=True, path=None, **options):
        if path is not None:
            stores.append(KVStore(path, model=model, tokenizer=tokenizer))
            options["store"] = stores[-1]
        made.append(Scheduler(model, tokenizer, **options))
        if started:
            made[-1].start()
        return made[-1]

    yield make
    for each in [*made, *stores]:
        each.close(60) if isinstance(each, Scheduler) else each.close()


@pytest.fixture
def scheduler(schedulers, small_model, small_tokenizer):
    return lambda **options: schedulers(small_model, small_tokenizer, **options)


def test_what_a_conversation_has_read_is_not_read_again(scheduler):
    """The next turn, a retry, an edited turn, and the first branch again."""

    async def main():
        ours = scheduler()
        start, said = await drawn(ours, IDS[:200], 6)
        assert start == Started(200, 0, "")
        history = [*IDS[:200], *said, *OTHER[:20]]
        assert (await drawn(ours, history))[0] == Started(len(history), 205, "memory")
        retried = await drawn(ours, IDS[:200], 6)
        assert retried == (Started(200, 199, "memory"), said)
        edited = [*IDS[:150], *OTHER[:30]]
        assert (await drawn(ours, edited))[0] == Started(180, 150, "memory")
        longer = [*history, *OTHER[20:30]]
        assert (await drawn(ours, longer))[0].cached_tokens >= len(history)
        assert check_kept(ours) == 3  # one of them goes back to all of the retried one

    asyncio.run(main())


def test_beyond_what_the_buffers_reach_the_nearest_boundary_counts(
    scheduler, small_model, monkeypatch, caplog
):
    usual = type(small_model).make_cache

    def made(model):
        state = usual(model)
        state.boundaries.spacing = NEAR
        return state

    monkeypatch.setattr(type(small_model), "make_cache", made)

    async def main():
        ours = scheduler()
        await drawn(ours, IDS[:450], 0)
        with caplog.at_level(logging.INFO):
            return (await drawn(ours, [*IDS[:110], *OTHER[:10]], 2, label="edited"))[0]

    assert asyncio.run(main()) == Started(120, 96, "memory")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("edited: prompt 120 tokens, 96 from memory (110 are alike, and 96 is")


def test_a_running_state_is_shared_by_those_who_begin_alike(scheduler):
    """A subagent, while the main conversation goes on; both say what they say alone."""

    async def main():
        ours, plain = scheduler(), scheduler(reuse=False)
        request, other = asked(IDS[:200], 30), asked([*IDS[:150], *OTHER[:40]], 10)
        main = await ours.submit(request)
        while not isinstance(await anext(main), Piece):
            pass
        fork = await ours.submit(other)
        (_, rest), (events, text) = await asyncio.gather(whole(main), whole(fork))
        assert events[0] == Started(190, 150, "memory")
        assert (await text_of(plain, request)).endswith(rest) and rest
        assert text == await text_of(plain, other)
        check_kept(ours)

    asyncio.run(main())


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_prefix_asked_for_twice_at_once_is_read_once(scheduler, cancelled):
    """Unless the one who reads it leaves."""

    async def main():
        ours = scheduler(started=False)
        prompts = [[*IDS[:200], *OTHER[n : n + 20]] for n in range(3)]
        answers = [await ours.submit(asked(prompt, 5)) for prompt in prompts]
        if cancelled:
            answers[0].cancel()
        ours.start()
        return [await whole(answer) for answer in answers[cancelled:]]

    results = asyncio.run(main())
    assert [events[0].cached_tokens for events, _ in results] == [0, 200, 200][: len(results)]
    assert all(isinstance(events[-1], Ended) for events, _ in results)


def test_a_failed_reader_lets_those_who_wait_for_it_begin(scheduler):
    async def main():
        ours = scheduler(started=False)
        bad = await ours.submit(asked(IDS[:200], 5, sampler=Failing(1)))
        good = await ours.submit(asked(IDS[:200], 5))
        ours.start()
        (events, _), (others, _) = await whole(bad), await whole(good)
        assert isinstance(events[-1], Failed) and isinstance(others[-1], Ended)
        assert others[0].cached_tokens == 199
        check_kept(ours)

    asyncio.run(main())


# Conversations


def conversation(*texts, system="You are a helpful assistant. " * 8):
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return encode_segments([{"role": "system", "content": system}, *turns], "none")


def test_a_compaction_and_an_edited_question_begin_where_they_part(schedulers, talker):
    """Exactly, however long what follows was."""
    model, tokenizer = talker
    long = "What do you think of this? " * 60

    async def main():
        ours = schedulers(model, tokenizer)
        first, second = conversation("One.", "Two.", long), conversation("One.", "Two.", "Else?")
        compacted = conversation("In short: one and two.")
        starts = [(await drawn(ours, prompt, 3))[0] for prompt in (first, second, compacted)]
        begin = tokenizer.encode_segments(conversation(""))
        ids = tokenizer.encode_segments(second)
        question = len(ids) - ids[::-1].index(tokenizer.encoder.token_to_id("<｜User｜>"))
        assert starts[1].cached_tokens >= question
        alike = [a == b for a, b in zip(begin, tokenizer.encode_segments(compacted), strict=False)]
        assert starts[2].cached_tokens >= alike.index(False) > 40

    asyncio.run(main())


def test_an_answer_is_found_by_its_text(schedulers, talker):
    """Sampled tokens need not be those that the tokenizer makes of their text."""
    model, tokenizer = talker

    async def main():
        ours = schedulers(model, tokenizer)
        said = "a plain answer with several words"
        prompt = tokenizer.encode_segments(conversation("Hello?"))
        letters = [tokenizer.encode(letter)[0] for letter in said]
        assert letters != tokenizer.encode(said)
        await drawn(ours, [*prompt, *letters], 0)
        follow = conversation("Hello?", said, "And now?")
        given = tokenizer.encode_segments(follow)
        count = await ours.count(follow)
        start, _ = await drawn(ours, follow, 2)
        assert start.cached_tokens == len(prompt) + len(letters)
        assert start.prompt_tokens == count > len(given)

    asyncio.run(main())


# Memory and disk


def test_what_leaves_memory_is_freed_at_once(scheduler):
    """Not only when Python looks for what refers to itself."""

    async def main():
        need = scheduler().worker.memory.needed(100)
        ours, taken = scheduler(memory=need * 2), []
        for n in range(6):
            await drawn(ours, IDS[n * 90 : n * 90 + 90], 3)
            taken.append(in_thread(ours, mx.get_active_memory))
        assert max(taken) - taken[0] < need * 2

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


@pytest.fixture
def short_saves(monkeypatch):
    """Saves of short prompts."""
    near = Policy(min_tokens=64, trim=8, align=32, interval=128)
    monkeypatch.setattr(prefixes, "Policy", lambda: near)


def test_what_leaves_memory_comes_back_from_the_store(scheduler, short_saves, tmp_path):
    async def main():
        need = scheduler().worker.memory.needed(100)
        ours, sources = scheduler(path=tmp_path / "kv", memory=need * 2), []
        want = (await drawn(ours, IDS[:90], 5))[1]
        for _ in range(2):
            await drawn(ours, OTHER[:90], 5)
            start, again = await drawn(ours, IDS[:90], 5)
            assert start.cached_tokens == 64 and again == want
            sources.append(start.source)
        assert ours.status().state_bytes <= need * 2 and ours.status().store_bytes > 0
        return sources

    assert asyncio.run(main()) == ["store", "store"]


def test_a_restart_goes_on_from_the_store(scheduler, short_saves, tmp_path):
    """The prompt that was saved on the way, and the answer, which was saved at the close."""

    async def first():
        ours = scheduler(path=tmp_path / "kv")
        await ours.remember(["call_1"], "text of a call")
        (_, said), other = await drawn(ours, IDS[:100], 40), await drawn(ours, OTHER[:90], 2)
        ours.close(60)
        return said, other[1]

    async def second(said, other):
        ours = scheduler(path=tmp_path / "kv")
        assert ours.replay["call_1"] == "text of a call" and ours.replay.get("call_2") is None
        start, _ = await drawn(ours, [*IDS[:100], *said], 2)
        assert (start.source, start.cached_tokens) == ("store", 128)
        start, again = await drawn(ours, OTHER[:90], 2)
        assert start == Started(90, 64, "store") and again == other
        check_kept(ours)

    asyncio.run(second(*asyncio.run(first())))


def test_a_store_that_cannot_be_read_is_passed_over(scheduler, short_saves, tmp_path, caplog):
    async def main():
        ours = scheduler(path=tmp_path / "kv")
        want = await drawn(ours, IDS[:90], 3)
        ours.close(60)
        for file in (tmp_path / "kv").rglob("*.kv"):
            file.write_bytes(b"damaged")
        again = await drawn(scheduler(path=tmp_path / "kv"), IDS[:90], 3)
        assert again == want and again[0].cached_tokens == 0

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert caplog.records


# Any order of events


@pytest.fixture
def failing_model(small_model, monkeypatch):
    """A model whose calls fail, every now and then, when they have moved their states on."""
    random, kind = np.random.default_rng(3), type(small_model)

    def made(usual):
        def call(*arguments):
            result = usual(*arguments)
            if random.random() < failures["share"]:
                failures["count"] += 1
                raise RuntimeError("[malloc] Unable to allocate 1000000 bytes.")
            return result

        return call

    failures = {"share": 0.0, "count": 0}
    for name in ("last_logits", "streams"):
        monkeypatch.setattr(kind, name, made(getattr(kind, name)))
    return failures


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_kept_states_are_those_of_their_tokens(
    scheduler, failing_model, tmp_path, seed
):
    """Requests that share beginnings; cancellations, failures of samplers and of the model, little
    memory, and a store."""
    random = np.random.default_rng(seed)

    def prompt():
        cut, more = random.integers(1, 100), random.integers(1, 30)
        begin = (IDS if random.random() < 0.7 else OTHER)[: int(cut)]
        return [*begin, *random.integers(2, 288, int(more)).tolist()]

    async def one(ours):
        options = {"sampler": Failing(int(random.integers(1, 6)))} if random.random() < 0.3 else {}
        answer = await ours.submit(asked(prompt(), int(random.integers(0, 9)), **options))
        stop, seen = int(random.integers(1, 20)), 0
        async for _ in answer:
            seen += 1
            if seen == stop:
                answer.cancel()

    async def main():
        need = scheduler().worker.memory.needed(200)
        ours = scheduler(path=tmp_path / "kv", memory=need * 8, max_batch=3)
        for _ in range(2):
            failing_model["share"] = 0.15
            await asyncio.gather(*(one(ours) for _ in range(5)))
            settled(ours)
            failing_model["share"] = 0.0
            assert check_kept(ours)
        assert failing_model["count"] > 1

    asyncio.run(main())
