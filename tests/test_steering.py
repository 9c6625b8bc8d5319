"""Steering: what is done to a model, exactly there, in every way of computing, and kept apart in a store."""

import asyncio
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from ahead import IDS, join, one_by_one, shown
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import run, run_chunks
from scheduling import drawn
from steering import tokens_of
from test_taps import graph

from ds4mlx import DataError, KVStore, load, stream_generate
from ds4mlx.chat import encode_messages
from ds4mlx.engine.sampling import Sampler
from ds4mlx.engine.scheduler import Scheduler
from ds4mlx.model.fused.choice import by_modules, launches
from ds4mlx.model.fused.seen import SHOWN
from ds4mlx.model.taps import Listener, listening
from ds4mlx.research import Steering, add, find_steering, project_out, separation
from ds4mlx.research.directions import _principal
from ds4mlx.research.steering import SITES

RNG = np.random.default_rng(11)
DIRECTIONS = {n: 3 * RNG.normal(size=128).astype(np.float32) for n in range(3)}


def steering(operation="project", site="ffn.out", layers=(0, 1, 2), scale=1.0):
    return Steering(operation, site, {n: DIRECTIONS[n] for n in layers}, scale)


def steered(model, how, chunks=(), count=24, **options):
    with model.steer(how, **options):
        return run_chunks(model, IDS[:count], chunks)


def held(model, ids):
    state = model.make_cache()
    run(model, ids, state)
    return state


# What is done


def test_a_scale_of_0_leaves_the_graph_and_every_bit(small_model, tmp_path):
    tokens, usual = mx.array([IDS[:20]]), run(small_model, IDS[:20])
    before = graph(small_model(tokens), tmp_path / "before")
    with small_model.steer(steering(), 0):
        assert graph(small_model(tokens), tmp_path / "at 0") == before
        assert (run(small_model, IDS[:20]) == usual).all()
    with small_model.steer(steering()):
        assert graph(small_model(tokens), tmp_path / "at 1") > before
        assert np.abs(run(small_model, IDS[:20]) - usual).max() > 1e-3
    assert (run(small_model, IDS[:20]) == usual).all()


@pytest.mark.parametrize("site", SITES)
def test_of_what_is_projected_out_nothing_is_left(small_model, site):
    """In prefill, in chunks, in steps; of every stream, where there are four."""
    how = steering("project", site)
    with small_model.steer(how), small_model.trace(f"layers.*.{site}") as t:
        run_chunks(small_model, IDS[:20], [9, 1, 1])
    for layer, unit in how.unit().items():
        value = np.array(t[f"layers.{layer}.{site}"]).astype(np.float64)
        assert np.abs(value @ unit).max() <= 1e-5 * np.abs(value).max()


@pytest.mark.parametrize("site", ["attn.out", "streams"])
@pytest.mark.parametrize("chunks", [[], [15, 7, 1]], ids=["whole", "chunks and steps"])
def test_it_is_the_intervention_that_it_says_it_is(small_model, site, chunks):
    """Bit for bit; in some of the layers, and nowhere else."""
    for operation, edit in (("add", add), ("project", project_out)):
        how, names = steering(operation, site), [f"layers.{n}.{site}" for n in (0, 2)]
        got = steered(small_model, how, chunks, scale=0.5, layers=[0, 2])
        given = {
            name: edit(mx.array(0.5 * DIRECTIONS[n]))
            if operation == "add"
            else edit(mx.array(DIRECTIONS[n]), 0.5)
            for n, name in zip((0, 2), names, strict=True)
        }
        with small_model.intervene(given):
            assert (run_chunks(small_model, IDS[:24], chunks) == got).all()


@settings(max_examples=5)
@given(st.lists(st.integers(1, 9), max_size=3), st.sampled_from(SITES), st.floats(-2, 2))
def test_any_chunks_and_launches_give_the_same(stored_model, chunks, site, scale):
    how = steering("add", site, (1, 2), 0.1 * scale)
    whole = steered(stored_model, how, count=20)
    with launches():
        parts = steered(stored_model, how, [*chunks, 1, 1], count=20)
    assert np.abs(parts - whole).max() <= 2e-4 * np.abs(whole).max()


@pytest.mark.parametrize("site", SITES)
def test_only_blocks_steered_where_launches_hide_it_leave_them(stored_model, site):
    """Which blocks go through their modules while a step is being computed."""

    class Asks(Listener):
        def wants(self, name):
            return False

        def begins(self, batch):
            seen.append(by_modules(stored_model.layers))

    seen, state = [], stored_model.make_cache()
    run(stored_model, IDS[:9], state)
    with stored_model.steer(steering(site=site, layers=[1])), launches(), listening(Asks()):
        stored_model.step([IDS[9]], [state])
    assert seen == [set() if site in SHOWN else {1}]


def test_another_model_stays_as_it_is(small_model, small_dir):
    other = load(small_dir, dtype=mx.float32, rounding="none")[0]
    usual = run(other, IDS[:9])
    with small_model.steer(steering()):
        assert (run(other, IDS[:9]) == usual).all()


def test_in_bfloat16_it_is_rounded_once(small_dir):
    model, how = load(small_dir)[0], steering("add", "streams", [2], 1.0)
    name = "layers.2.streams"
    with model.trace(name) as plain, model.steer(how), model.trace(name) as t:
        model(mx.array([IDS[:9]]))
    want = plain[name].astype(mx.float32) + mx.array(DIRECTIONS[2])
    assert (t[name] == want.astype(mx.bfloat16)).all().item()


# While text is written


def test_tokens_ahead_are_those_of_the_steered_model(small_model, begin, decoding):
    """And of the unsteered one as soon as it is unsteered: what was ahead is left out."""
    how, greedy = steering("add", scale=0.5), Sampler(temperature=0)
    with small_model.steer(how):
        want = one_by_one(small_model, begin(sampler=greedy), 6)
        sequence = begin(sampler=greedy)
        join(decoding, sequence)
        for token, state in want:
            assert decoding.step()[0].token == token
            assert shown(sequence.state) == state
        assert decoding._members[0].ahead is not None
        fork = held(small_model, sequence.tokens[:-1])
    assert sequence.state.made_under == {how.name(0.5)}
    last = run(small_model, sequence.tokens[-1:], fork)
    assert decoding.step()[0].token == last.argmax()


@pytest.mark.parametrize("drafts", [0, 2])
def test_generated_text_is_that_of_whole_calls(small_model, small_tokenizer, drafts):
    with small_model.steer(steering("add", "attn.out", scale=0.5)):
        made = tokens_of(stream_generate(small_model, small_tokenizer, IDS[:30], 5, drafts=drafts))
        ids = list(IDS[:30])
        for _ in range(5):
            ids.append(int(run(small_model, ids)[-1].argmax()))
    assert made == ids[30:]


def test_a_scheduler_that_is_made_inside_is_steered(small_model, small_tokenizer):
    with small_model.steer(steering("add", scale=0.5)):
        want = tokens_of(stream_generate(small_model, small_tokenizer, IDS[:30], 6))
        scheduler = Scheduler(small_model, small_tokenizer)
    scheduler.start()
    try:
        assert asyncio.run(drawn(scheduler, IDS[:30], 6))[1] == want
    finally:
        scheduler.close(30)
    assert want != tokens_of(stream_generate(small_model, small_tokenizer, IDS[:30], 6))


# The KV store


def test_a_store_keeps_steered_states_apart(small_model, tmp_path):
    """Found under the same steering only, whatever object it is; and the others as ever."""
    ids, how = np.array(IDS[:300]), steering("add", scale=0.5)
    with KVStore(tmp_path / "kv", model=small_model) as store:
        store.save(ids, held(small_model, ids))
        with small_model.steer(how):
            assert store.longest(ids) == store.restore(ids)[1] == 0
            made = held(small_model, ids)
            store.save(ids[:200], made)
            want = run(small_model, IDS[300:310], made)
    with KVStore(tmp_path / "kv", model=small_model) as store:
        assert store.restore(ids)[1] == 300
        for other in (replace(how, scale=0.25), steering("add", "attn.out", scale=0.5)):
            with small_model.steer(other):
                assert store.restore(ids)[1] == 0
        with small_model.steer(steering("add"), 0.5):
            state, count = store.restore(ids)
            assert count == 200 and state.made_under == {how.name(0.5)}
            run(small_model, ids[200:], state)
            assert np.abs(run(small_model, IDS[300:310], state) - want).max() < 1e-4
            store.save(ids, state)
            with small_model.steer(how):
                assert store.restore(ids)[1] == 0


def test_what_is_no_state_of_any_prompt_is_not_saved(small_model, tmp_path):
    ids = np.array(IDS[:20])
    with KVStore(tmp_path / "kv", model=small_model) as store:
        partly = held(small_model, ids[:10])
        with small_model.steer(steering()):
            run(small_model, ids[10:], partly)
        with small_model.intervene({"layers.0.ffn.out": lambda value, where: value}):
            changed = held(small_model, ids)
            assert store.restore(ids)[1] == 0
        for state in (partly, changed):
            with pytest.raises(DataError, match="while the model was being changed"):
                store.save(ids, state)
            copy = small_model.make_cache()
            copy.share(state)
            with pytest.raises(DataError, match="while the model was being changed"):
                store.save(ids, copy)
            state.rewind(0)
            run(small_model, ids, state)
            store.save(ids, state)


# Directions


def test_a_direction_is_the_difference_of_the_means(small_model):
    groups = [[IDS[:5], IDS[7:11]], [IDS[20:29], IDS[3:9], IDS[40:42]]]
    means = []
    for prompts in groups:
        ends = []
        for prompt in prompts:
            with small_model.trace("layers.1.streams") as t:
                run(small_model, prompt)
            ends.append(np.array(t["layers.1.streams"])[0, -1].mean(0))
        means.append(np.mean(ends, axis=0))
    found = find_steering(small_model, *groups, site="streams", operation="project", layers=[1])
    assert found.operation == "project" and found.layers == [1]
    assert np.abs(found.directions[1] - (means[0] - means[1])).max() < 1e-5
    every = find_steering(small_model, *groups, tokens="all")
    assert every.site == "ffn.out" and every.layers == [0, 1, 2]


@given(
    st.integers(0, 1 << 32),
    st.lists(st.floats(0.5, 9), min_size=1, max_size=6),
    st.floats(0, 1e-3),
)
def test_the_principal_component_is_the_direction_of_the_differences(seed, lengths, noise):
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=32)
    unit /= np.linalg.norm(unit)
    others = rng.normal(size=(len(lengths), 32))
    wanted = others + np.outer(lengths, unit) + noise * rng.normal(size=others.shape)
    found = _principal(wanted, others)
    assert found @ unit / np.linalg.norm(found) > 0.99
    assert abs(np.linalg.norm(found) - np.sqrt(np.mean(np.square(lengths)))) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wanted": []}, "made of prompts"),
        ({"wanted": [[]]}, "a token or more"),
        ({"wanted": ["a text"]}, "not that of one sequence"),
        ({"method": "principle"}, "method is mean or principal, not 'principle'"),
        ({"tokens": "first"}, "tokens is last or all, not 'first'"),
        ({"others": [IDS[:5]], "method": "principal"}, "2 and 1 prompts are not pairs"),
        ({"others": [IDS[:5], IDS[5:8]]}, "no direction but 0"),
        ({"site": "attn.rows"}, "steering is done at .* not at 'attn.rows'"),
        ({"operation": "scale"}, "add or project, not 'scale'"),
        ({"layers": [3]}, "layers 0 to 2, no 3"),
    ],
)
def test_what_makes_no_direction(small_model, options, message):
    given = {"wanted": [IDS[:5], IDS[5:8]], "others": [IDS[:4], IDS[5:9]], **options}
    with pytest.raises(DataError, match=message):
        find_steering(small_model, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "must be finite"),
        ({"scale": float("inf")}, "must be finite"),
        ({"layers": [5]}, "layers 0 to 2, no 5"),
        ({"layers": [2]}, "directions for layer 0, 1, not for layer 2"),
        ({"layers": []}, "not for no layer"),
    ],
)
def test_what_cannot_be_steered(small_model, options, message):
    with pytest.raises(DataError, match=message):
        small_model.steer(steering(layers=(0, 1)), **options)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "no direction but 0 for any layer"),
        ({1: np.zeros(4)}, "layer 1 is 0"),
        ({1: np.ones(4), 2: np.ones(5)}, r"layer 2 is \(5,\), not \(4,\)"),
        ({1: np.array([1, np.nan])}, "not finite"),
        ({-1: np.ones(4)}, "no layer -1"),
    ],
)
def test_what_is_no_steering(directions, message):
    with pytest.raises(DataError, match=message):
        Steering("add", "streams", directions)


def test_widths_and_layers_of_another_model(small_model):
    with pytest.raises(DataError, match="4 channels are not of a model of 128"):
        small_model.steer(Steering("add", "streams", {0: np.ones(4)}))
    with pytest.raises(DataError, match="layers 0 to 2, no 7"):
        small_model.steer(Steering("add", "streams", {7: np.ones(128)}))


# The small trained model

REQUESTS = ("Write a function that {}.", "I need a function that {}.")


def test_a_direction_turns_what_the_trained_model_writes(embedded):
    """From requests for the larger number to ones for the smaller, tried on a request of other words."""
    model, tokenizer = embedded

    def asked(words, which):
        message = {"role": "user", "content": words.format(f"returns the {which} of two numbers")}
        return tokenizer.encode(encode_messages([message], thinking="none"))

    def odds(which):
        """Of writing `smaller` and not `larger`, in nats, where the name of the function comes."""
        ids = asked("Can you write a function that {}?", which) + tokenizer.encode("```python\ndef")
        row = run(model, ids)[-1]
        names = [tokenizer.encode(f"```python\ndef {name}")[-1] for name in ("smaller", "larger")]
        return row[names[0]] - row[names[1]]

    groups = [[asked(words, which) for words in REQUESTS] for which in ("smaller", "larger")]
    how = find_steering(model, *groups, site="attn.out", layers=[3])
    assert separation(model, how, *groups)[3] > 3
    assert odds("larger") < -5
    with model.steer(how, 4):
        assert odds("larger") > 1
    out = find_steering(model, *groups, site="streams", operation="project", tokens="all")
    apart = odds("smaller") - odds("larger")
    with model.steer(out):
        assert abs(odds("smaller") - odds("larger")) < 0.1 * apart
