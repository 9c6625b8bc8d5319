"""Several clients of one server at once, by HTTP: what each is told, and how long each waits."""

import asyncio

import pytest
import serving
from asking import PATHS, ask, body_of, events, sent, streamed, text_in, whole

from ds4mlx.engine import reading

TASKS = ["adds two numbers", "reads a file", "sorts a list", "counts words"]
QUESTIONS = [f"Write a function that {task}." for task in TASKS]
# Where two tokens are closer than this in log-probability, either may be drawn.
TIE = 1e-3


def at_once(port, requests):
    """The answers to (protocol, body, whether streamed), all asked for together."""

    async def main():
        asked = [
            (streamed if stream else whole)(port, name, body) for name, body, stream in requests
        ]
        return await asyncio.gather(*asked)

    return asyncio.run(main())


def test_eight_clients_are_told_what_each_is_told_alone(embedded):
    check_that_all_are_told_the_same(embedded, 2, 6)


@pytest.mark.slow
def test_long_prompts_of_eight_clients_change_nothing(embedded):
    check_that_all_are_told_the_same(embedded, 60, 40)


def check_that_all_are_told_the_same(loaded, repeated, most):
    """To the letter, where chunks are aligned; in every protocol, streamed and whole."""
    names = ["chat", "messages", "responses", "completions"]
    requests = [
        (name, body_of(name, question + " Be brief." * (repeated * at), most), at % 2 == (at < 4))
        for at, (name, question) in enumerate(zip(names * 2, QUESTIONS * 2, strict=True))
    ]
    with serving.serving(*loaded, aligned=True) as server:
        together = at_once(server.port, requests)
        alone = [at_once(server.port, [request])[0] for request in requests]
    assert together == alone and len(set(alone)) > 3


def test_eight_clients_are_told_the_same_up_to_ties(served):
    """With prefixes reused and chunks that depend on others: at most one of eight is tied."""

    def body(at):
        text = f"{QUESTIONS[at % 4]} {'Use short names. ' * (at // 4 * 4)}"
        return body_of("chat", text, 6, logprobs=True, top_logprobs=2)

    async def tokens(at):
        status, told = await ask(served.port, "POST", PATHS["chat"], body(at))
        assert status == 200, told
        return told["choices"][0]["logprobs"]["content"]

    async def main():
        together = await asyncio.gather(*map(tokens, range(8)))
        return together, [await tokens(at) for at in range(8)]

    tied = [difference(*pair) for pair in zip(*asyncio.run(main()), strict=True)]
    assert max(filter(None, tied), default=0) < TIE and 8 - tied.count(None) <= 1


def difference(one, other):
    """How far apart the two most probable tokens are where two answers part; None if they do not."""
    for ours, theirs in zip(one, other, strict=False):
        if ours["token"] != theirs["token"]:
            first, second = (top["logprob"] for top in theirs["top_logprobs"])
            return first - second
    return None if len(one) == len(other) else TIE


def test_a_prompt_of_many_chunks_stops_nobody(talker, monkeypatch):
    monkeypatch.setattr(reading, "SHARED_STEP", 64)
    monkeypatch.setattr(reading, "PREFILL_STEP", 256)
    check_that_nobody_waits(talker, 1000)


@pytest.mark.slow
def test_a_long_prompt_stops_nobody(talker):
    """With chunks as they are."""
    check_that_nobody_waits(talker, 4000)


def check_that_nobody_waits(loaded, length):
    """A stream goes on while a long prompt is read, and a short question that comes then passes it."""
    order, begun = [], {name: asyncio.Event() for name in ("stream", "long")}

    async def read(port, name, prompt, most):
        body = body_of("completions", prompt, most, stream=True)
        reader, writer = await sent(port, "POST", PATHS["completions"], body)
        try:
            if name == "long":  # its headers say that it is about to be read
                await serving_it(port)
                begun[name].set()
            async for event in events(reader):
                if text_in("completions", event):
                    order.append(name)
                    begun.get(name, asyncio.Event()).set()
        finally:
            writer.close()

    async def serving_it(port):
        while (await ask(port, "GET", "/health"))[1]["running"] < 2:
            pass

    async def main(port):
        ids = [2 + n * n % 250 for n in range(length)]
        stream = asyncio.create_task(read(port, "stream", ids[:43], 10_000))
        await begun["stream"].wait()
        long = asyncio.create_task(read(port, "long", ids[::-1], 1))
        await begun["long"].wait()
        order.append("asked")
        await read(port, "short", ids[50:100], 3)
        await long
        stream.cancel()

    with serving.serving(*loaded) as server:
        asyncio.run(main(server.port))
    between = order[order.index("asked") : order.index("long")]
    assert "short" in between and between.count("stream") >= 7
