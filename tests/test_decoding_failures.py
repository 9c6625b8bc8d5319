"""Ctrl-C, failures and values that are not finite while a step is on its way."""

import signal

import mlx.core as mx
import numpy as np
import pytest
from ahead import IDS, NEAR, SEEDED, join, one_by_one, shown
from steering import Dictation, Failing, InterruptAt, tokens_of

from ds4mlx import DataError, stream_generate
from ds4mlx.engine.decoding import Decoding
from ds4mlx.engine.sampling import Sampler

POISON = 287  # a token whose embedding is made NaN


@pytest.fixture
def poisoned(small_model):
    """The model, with an embedding that makes everything NaN."""
    sound = small_model.embed.weight
    weight = mx.array(sound)
    weight[POISON] = mx.nan
    small_model.embed.weight = weight
    yield small_model
    small_model.embed.weight = sound


@pytest.mark.parametrize("point", ["_run_ahead", "_read", "_taken"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_around_a_read_leaves_the_state_whole(
    small_model, begin, small_tokenizer, monkeypatch, point, when
):
    """A signal between submitting, reading and taking waits for the step's end."""
    usual, calls = getattr(Decoding, point), []

    def interrupted(*arguments):
        calls.append(point)
        if len(calls) == 4 and when == "before":
            signal.raise_signal(signal.SIGINT)
        result = usual(*arguments)
        if len(calls) == 4 and when == "after":
            signal.raise_signal(signal.SIGINT)
        return result

    cache = small_model.make_cache()
    cache.boundaries.spacing = NEAR
    run = stream_generate(small_model, small_tokenizer, IDS[:40], 30, cache=cache, sampler=SEEDED)
    with monkeypatch.context() as patch:
        patch.setattr(Decoding, point, interrupted)
        given = []
        with pytest.raises(KeyboardInterrupt):
            given += [next(run).token for _ in range(9)]
    want = one_by_one(small_model, begin(), 9)
    assert len(calls) == 4 and shown(cache) == want[3][1]
    rest = stream_generate(
        small_model, small_tokenizer, [want[3][0]], 5, cache=cache, sampler=SEEDED
    )
    assert tokens_of(rest) == [token for token, _ in want[4:]]


def test_ctrl_c_anywhere_shows_no_step_ahead(small_model, begin, small_tokenizer):
    want = one_by_one(small_model, begin(), 9)

    def run(cache):
        cache.boundaries.spacing = NEAR
        list(
            stream_generate(small_model, small_tokenizer, IDS[:40], 9, cache=cache, sampler=SEEDED)
        )

    with InterruptAt(0) as whole:
        run(small_model.make_cache())
    for point in np.random.default_rng(1).integers(whole.count // 9, whole.count, 12).tolist():
        cache = small_model.make_cache()
        with pytest.raises(KeyboardInterrupt), InterruptAt(point):
            run(cache)
        if cache.offset >= 40:
            assert shown(cache) == want[cache.offset - 40][1]


# Failures


@pytest.mark.parametrize("last", [1, 2, 5])
def test_a_step_ahead_that_fails_is_told_when_it_is_asked_for(
    small_model, begin, small_tokenizer, last
):
    cache = small_model.make_cache()
    cache.boundaries.spacing = NEAR
    options = {"sampler": Failing(last), "cache": cache}
    run, given = stream_generate(small_model, small_tokenizer, IDS[:40], 30, **options), []
    with pytest.raises(RuntimeError, match="out of memory"):
        given += [next(run).token for _ in range(last - 1)]
        next(run)
    greedy = begin(sampler=Sampler(temperature=0))
    if last > 1:
        assert shown(cache) == one_by_one(small_model, greedy, last - 1)[-1][1]


@pytest.mark.parametrize("count", [1, 4])
def test_a_step_ahead_that_is_not_finite_costs_no_token(
    poisoned, small_model, begin, small_tokenizer, count
):
    """The token that it is fed is given out; the error comes where its successor is asked for."""
    tokens = [*IDS[100 : 99 + count], POISON, 5, 5, 5]
    cache = small_model.make_cache()
    cache.boundaries.spacing = NEAR
    options = {"sampler": Dictation(tokens), "cache": cache}
    run = stream_generate(small_model, small_tokenizer, IDS[:40], 30, **options)
    assert [next(run).token for _ in range(count)] == tokens[:count]
    with pytest.raises(DataError, match=f"after {40 + count} tokens .*the embedding is the first"):
        next(run)
    plain = begin(sampler=Dictation(tokens))
    assert shown(cache) == one_by_one(small_model, plain, count)[-1][1]


def test_one_that_is_not_finite_leaves_and_the_others_go_on(poisoned, small_model, begin, decoding):
    others = [begin(30, Sampler(seed=1)), begin(50, Sampler(seed=2))]
    want = [[token for token, _ in one_by_one(small_model, other, 8)] for other in others]
    alone = [begin(30, Sampler(seed=1)), begin(50, Sampler(seed=2))]
    bad = begin(45, Dictation([7, POISON, 8, 8, 8]))
    for sequence in (alone[0], bad, alone[1]):
        join(decoding, sequence)
    steps = [decoding.step() for _ in range(8)]
    assert [len(taken) for taken in steps] == [3, 3, 3, 2, 2, 2, 2, 2]
    failed = steps[2][1]
    assert failed.sequence is bad and "not finite" in str(failed.error)
    assert bad.state.offset == 46 and bad.fed == bad.tokens[:-1]
    assert [s.tokens[-8:] for s in alone] == want
