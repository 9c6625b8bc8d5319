"""Text from a model: repeatable, stopped where it should be, whatever the chunks and the cache."""

import signal
import threading

import mlx.core as mx
import numpy as np
import pytest
from steering import InterruptAt, text_of, tokens_of

from ds4mlx import DataError, KVStore, generate, stream_generate
from ds4mlx.engine import generation
from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.sampling import Sampler, log_probs
from ds4mlx.engine.sequence import Sequence
from ds4mlx.engine.step import draw, step

PROMPT = "def add(a, b):\n    return"


def test_generate_is_the_joined_stream(talker):
    whole = generate(*talker, PROMPT, max_tokens=12)
    assert whole == text_of(stream_generate(*talker, PROMPT, max_tokens=12))
    assert whole == generate(*talker, PROMPT, 12, sampler=Sampler(temperature=0))
    assert len(whole) > 10


def test_text_is_that_of_the_tokens(talker):
    seen = list(stream_generate(*talker, PROMPT, 40, sampler=Sampler(seed=2)))
    tokens = [t for t in tokens_of(seen) if t != talker[1].eos_token_id]
    assert text_of(seen) == talker[1].decode(tokens)


def test_greedy_tokens_are_those_of_whole_forward_passes(talker):
    model, tokenizer = talker
    seen = list(stream_generate(model, tokenizer, PROMPT, 20))
    ids = tokenizer.encode(PROMPT)
    logits = model(mx.array([ids + tokens_of(seen)]))[0, len(ids) - 1 : -1]
    assert tokens_of(seen) == mx.argmax(logits, axis=-1).tolist()
    wanted = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for response, row in zip(seen, wanted, strict=True):
        assert response.logprobs.dtype == mx.float32
        assert mx.exp(response.logprobs).sum().item() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(np.array(response.logprobs), np.array(row), atol=1e-3)


def test_log_probabilities_are_the_models_whatever_the_sampler(talker):
    plain = next(stream_generate(*talker, PROMPT))
    cold = next(stream_generate(*talker, PROMPT, sampler=Sampler(0.1, top_k=2, seed=1)))
    assert plain.logprobs.tolist() == cold.logprobs.tolist()


def test_log_probabilities_are_computed_when_they_are_read(talker, monkeypatch):
    """Of no token before somebody reads them, then of that one, once."""
    computed = []
    monkeypatch.setattr(
        generation, "log_probs", lambda logits: (computed.append(logits), log_probs(logits))[1]
    )
    seen = list(stream_generate(*talker, PROMPT, 8))
    assert computed == []
    assert seen[3].logprobs is seen[3].logprobs
    assert [each is seen[3].logits for each in computed] == [True]


def test_a_seed_repeats_the_tokens(talker):
    def drawn(seed):
        return tokens_of(stream_generate(*talker, PROMPT, 12, sampler=Sampler(seed=seed)))

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


def test_text_and_its_ids_are_the_same_prompt(talker):
    ids = talker[1].encode(PROMPT)
    assert generate(*talker, ids, 10) == generate(*talker, PROMPT, 10)
    assert generate(*talker, np.array(ids), 10) == generate(*talker, PROMPT, 10)


# What is refused, before anything runs


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([5, 3072], {}, "token id 3072 is outside the vocabulary of 3072"),
        ([-1], {}, "token id -1 is outside"),
        ([5.0, 1.5], {}, "5.0 is no token id, as it is no whole number"),
        (mx.array([1.5]), {}, "1.5 is no token id"),
        ([{"role": "user", "content": "x"}], {}, "is no token id, as it is no whole number"),
        ([[5, 6], [7, 8]], {}, r"the shape \[2, 2\], not that of one sequence"),
        (b"text", {}, "not that of one sequence"),
        (None, {}, "not that of one sequence"),
        ("x", {"max_tokens": -1}, "max_tokens must be a whole number at least 0"),
        ("x", {"max_tokens": 2.5}, "max_tokens must be a whole number at least 0, not 2.5"),
        ("x", {"max_tokens": True}, "max_tokens must be a whole number"),
        ("x", {"max_tokens": 1 << 80}, "exceed the context of 65536"),
        ("x", {"stop": [5]}, "a stop string is not text"),
        ("x", {"max_tokens": 65536}, "exceed the context of 65536"),
        ([5] * 65536, {"max_tokens": 1}, "65536 tokens of prompt and 1 to generate exceed"),
        ("x", {"prefill_step": 0}, "prefill_step must be a whole number at least 1"),
        ("a\udc80", {}, "the text is not Unicode"),
    ],
)
def test_bad_requests_are_refused_at_once(talker, prompt, options, message):
    cache = talker[0].make_cache()
    with pytest.raises(DataError, match=message):
        stream_generate(*talker, prompt, cache=cache, **options)
    assert cache.offset == 0


def test_what_a_cache_holds_counts_as_context(talker):
    cache = talker[0].make_cache()
    list(stream_generate(*talker, "x" * 50, 1, cache=cache))
    room = 65536 - cache.offset - 1
    assert next(stream_generate(*talker, [5], room, cache=cache)).token >= 0
    with pytest.raises(DataError, match="exceed the context"):
        stream_generate(*talker, [5], room, cache=cache)


# Prefill and cache


@pytest.mark.parametrize("step", [3, 64, 149, 150, 151])
def test_chunks_do_not_change_the_tokens(talker, step):
    ids = np.random.default_rng(3).integers(16, 768, 150).tolist()
    told = []
    options = {"prefill_step": step, "on_prefill": lambda *told_now: told.append(told_now)}
    want = tokens_of(stream_generate(*talker, ids, 8))
    assert tokens_of(stream_generate(*talker, ids, 8, **options)) == want
    assert told == [(min(done, 150), 150) for done in range(step, 150 + step, step)]


def test_prefill_gives_the_last_logits(talker):
    model, tokenizer = talker
    ids, cache = tokenizer.encode(PROMPT * 5), model.make_cache()
    logits = prefill(model, ids, cache, step=16)
    assert cache.offset == len(ids) and logits.shape == (1, model.args.vocab_size)
    np.testing.assert_allclose(np.array(logits), np.array(model(mx.array([ids]))[:, -1]), atol=1e-3)


@pytest.mark.parametrize("taken", [1, 2, 9])
def test_a_cache_holds_all_but_the_last_token(talker, taken):
    """However the answer ends; so what was given out can be continued exactly."""
    model, tokenizer = talker
    ids = tokenizer.encode(PROMPT)
    want = tokens_of(stream_generate(model, tokenizer, ids, 20))
    cut, closed = model.make_cache(), model.make_cache()
    assert tokens_of(stream_generate(model, tokenizer, ids, taken, cache=cut)) == want[:taken]
    responses = stream_generate(model, tokenizer, ids, 20, cache=closed)
    assert tokens_of(next(responses) for _ in range(taken)) == want[:taken]
    responses.close()
    for cache in (cut, closed):
        assert cache.offset == len(ids) + taken - 1
        last = want[taken - 1 : taken]
        rest = tokens_of(stream_generate(model, tokenizer, last, 20 - taken, cache=cache))
        assert rest == want[taken:]


# Ctrl-C


def test_ctrl_c_anywhere_leaves_the_cache_whole(talker):
    """The layers agree, and going on from there gives what an undisturbed run gives."""
    model, tokenizer = talker
    ids = tokenizer.encode(PROMPT * 4)
    options = {"prefill_step": 16}
    want = tokens_of(stream_generate(model, tokenizer, ids, 6, **options))
    with InterruptAt(0) as whole:
        list(stream_generate(model, tokenizer, ids, 6, **options))
    for point in np.random.default_rng(8).integers(1, whole.count, 14).tolist():
        cache = model.make_cache()
        with pytest.raises(KeyboardInterrupt), InterruptAt(point):
            list(stream_generate(model, tokenizer, ids, 6, cache=cache, **options))
        end = cache.offset
        assert {layer.offset for layer in cache} == {end}
        fed = (ids + want)[end : max(len(ids), end + 1)]
        known = want[: max(0, end + 1 - len(ids))]
        rest = stream_generate(model, tokenizer, fed, 6 - len(known), cache=cache)
        assert known + tokens_of(rest) == want
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_several_sequences_go_on_together_as_each_alone(talker):
    """Of different lengths, with their own samplers and stops; one is left on the way."""
    model, tokenizer = talker
    texts = ["a", "def add(a, b):\n    return", "The answer is"]
    samplers = [Sampler(seed=3), Sampler(temperature=0), Sampler(0.7, top_p=0.9, seed=4)]
    want = [
        tokens_of(stream_generate(model, tokenizer, text, 9, sampler=sampler))
        for text, sampler in zip(texts, samplers, strict=True)
    ]
    together = [
        Sequence(tokenizer.encode(text), model.make_cache(), tokenizer, sampler=sampler)
        for text, sampler in zip(texts, samplers, strict=True)
    ]
    logits = [prefill(model, sequence.pending, sequence.state) for sequence in together]
    drawn = draw(together, mx.concatenate(logits))
    for number in range(9):
        for sequence, token in zip(together, drawn, strict=True):
            sequence.take(token)
        assert [s.tokens[-1:] for s in together] == [s.pending for s in together]
        if number == 4:
            left = together.pop(1)
        drawn, logits = step(model, together)
        assert logits.shape == (len(together), model.args.vocab_size)
    assert [s.tokens[-9:] for s in together] == [want[0], want[2]]
    assert left.tokens[-5:] == want[1][:5] and left.fed == left.tokens[:-1]
    going_on = stream_generate(model, tokenizer, left.pending, 4, cache=left.state)
    assert tokens_of(going_on) == want[1][5:]


def test_draws_go_on_where_a_sequence_was_left(talker):
    """They depend on the seed and the position, not on how many were made before."""
    model, tokenizer = talker
    sampler, cache = Sampler(seed=9), model.make_cache()
    want = tokens_of(stream_generate(model, tokenizer, PROMPT, 12, sampler=sampler))
    got = tokens_of(stream_generate(model, tokenizer, PROMPT, 5, sampler=sampler, cache=cache))
    rest = stream_generate(model, tokenizer, got[-1:], 7, sampler=sampler, cache=cache)
    assert got + tokens_of(rest) == want


def test_a_store_and_a_cache_are_not_taken_together(talker, tmp_path):
    options = {"cache": talker[0].make_cache(), "store": KVStore(tmp_path, model=talker[0])}
    with pytest.raises(DataError, match="those that the cache holds are not known"):
        generate(*talker, PROMPT, **options)


def test_other_threads_generate_too(talker):
    """Where signals can neither come nor be handled."""
    got = []
    thread = threading.Thread(target=lambda: got.append(generate(*talker, PROMPT, 5)))
    thread.start()
    thread.join()
    assert got == [generate(*talker, PROMPT, 5)]
