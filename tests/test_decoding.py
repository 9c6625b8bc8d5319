"""Tokens that are computed ahead: no state shows them before they are asked for, whatever happens."""

from dataclasses import FrozenInstanceError

import mlx.core as mx
import numpy as np
import pytest
from ahead import IDS, NEAR, join, one_by_one, shown
from steering import Dictation, tokens_of

from ds4mlx import DataError, KVStore, stream_generate
from ds4mlx.engine.prefill import prefill, prefill_chunks
from ds4mlx.engine.sampling import Sampler
from ds4mlx.model.taps import Listener, listening
from ds4mlx.state.boundaries import Spacing


@pytest.mark.parametrize("length", [100, 255, 375])
def test_every_state_between_two_tokens_is_the_one_without_running_ahead(
    small_model, small_tokenizer, begin, decoding, length
):
    """Over regular boundaries, thinned ones, boundaries asked for, new rows, and new buffers."""
    tokens = [token for token in reversed(IDS) if token != small_tokenizer.eos_token_id]
    sequences = [begin(length, Dictation(tokens), 50) for _ in range(2)]
    for sequence in sequences:
        for position in (1, 9, 12, 33):
            sequence.state.add_boundary(length + position)
    want = one_by_one(small_model, sequences[0], 34)
    join(decoding, sequences[1])
    for token, state in want:
        assert decoding.step()[0].token == token
        assert shown(sequences[1].state) == state
    assert sequences[1].state.offset == length + 33 and len(want[-1][1][1]) > 4


def test_the_next_step_is_submitted_before_a_token_is_read(begin, decoding):
    class Counting(Sampler):
        def __call__(self, logits, key):
            calls.append(key)
            return super().__call__(logits, key)

    calls = []
    join(decoding, begin(sampler=Counting(temperature=0), max_tokens=4))
    counts = []
    while decoding:
        decoding.step()
        counts.append(len(calls))
    assert counts == [2, 3, 4, 4]  # and none beyond the last that may come


# Ends


def ended(model, small_tokenizer, tokens, taken=None, **options):
    """The cache after an answer of these tokens, and what was given out."""
    cache = model.make_cache()
    cache.boundaries.spacing = NEAR
    cache.add_boundary(40 + len(tokens))
    run = stream_generate(
        model, small_tokenizer, IDS[:40], 100, sampler=Dictation(tokens), cache=cache, **options
    )
    seen = [next(run) for _ in range(taken)] if taken else list(run)
    run.close()
    return cache, tokens_of(seen)


@pytest.mark.parametrize("how", ["stop", "end", "close"])
@pytest.mark.parametrize("count", [1, 8, 9, 24])
def test_an_end_leaves_the_state_at_what_was_given_out(
    small_model, begin, small_tokenizer, how, count
):
    """The step ahead has passed a regular boundary, or the one that was asked for, or none."""
    end = small_tokenizer.eos_token_id
    tokens = [t for t in IDS[100:200] if t != end][: count - 1]
    options = {}
    if how == "stop":
        letter = next(t for t in range(300) if small_tokenizer.token_bytes(t) == b"~")
        tokens, options = [t for t in tokens if t != letter] + [letter, 5], {"stop": "~"}
    elif how == "end":
        tokens += [end, 5]
    else:
        tokens += [6, 5]
    count = len(tokens) - 1
    cache, seen = ended(
        small_model, small_tokenizer, tokens, count if how == "close" else None, **options
    )
    assert seen == tokens[:count]
    plain = begin(40, sampler=Dictation(tokens))
    plain.state.add_boundary(40 + len(tokens))
    want = one_by_one(small_model, plain, count)[-1][1]
    assert shown(cache) == want


def test_an_iterator_that_is_only_left_shows_nothing_ahead(small_model, small_tokenizer):
    """Nor does it disturb who goes on with the cache meanwhile; then it goes on from there."""
    cache, again = small_model.make_cache(), small_model.make_cache()
    run = stream_generate(small_model, small_tokenizer, IDS[:40], 9, cache=cache)
    first = [next(run).token for _ in range(3)]
    assert cache.offset == 42
    whole = tokens_of(stream_generate(small_model, small_tokenizer, IDS[:40], 9, cache=again))
    rest = stream_generate(small_model, small_tokenizer, first[-1:], 3, cache=cache)
    assert first + tokens_of(rest) == whole[:6]
    run.close()
    assert cache.offset == 45 and first == whole[:3]


# What is changed between two tokens


def changed(state, model, what):
    if what == "rewind":
        state.rewind(state.offset - 3)
    elif what == "asked":
        state.add_boundary(state.offset + 1)
    elif what == "dropped":
        state.drop_boundary(48)
    elif what == "spacing":
        state.boundaries.spacing = Spacing(7, 64, 32)
    elif what == "weight":
        model.norm.weight = model.norm.weight * -1


@pytest.mark.parametrize("what", ["rewind", "asked", "dropped", "spacing", "weight"])
@pytest.mark.parametrize("after", [1, 7, 9])
def test_what_is_changed_between_two_tokens_counts_at_once(
    small_model, begin, decoding, what, after
):
    """As if the next step had not been submitted."""
    sound, got = small_model.norm.weight, []
    plain, ahead = begin(), begin()
    for sequence in (plain, ahead):
        sequence.state.add_boundary(48)
    try:
        between = iter([what if n == after else "nothing" for n in range(1, 30)])
        want = one_by_one(
            small_model, plain, 14, lambda: changed(plain.state, small_model, next(between))
        )
        small_model.norm.weight = sound
        join(decoding, ahead)
        for number in range(1, 15):
            token = decoding.step()[0].token
            changed(ahead.state, small_model, what if number == after else "nothing")
            got.append((token, shown(ahead.state)))
    finally:
        small_model.norm.weight = sound
    assert got == want


def test_a_listener_hears_the_step_that_makes_the_token(begin, decoding):
    class Heard(Listener):
        def wants(self, name):
            return name == "logits"

        def take(self, name, value, span):
            heard.append(value)
            return value

    heard = []
    join(decoding, begin())
    decoding.step()
    for _ in range(2):
        with listening(Heard()):
            (taken,) = decoding.step()
        (logits,) = heard
        assert np.array_equal(np.array(logits), np.array(taken.logits))
        heard.clear()
        decoding.step()


# Several


def test_sequences_join_and_leave_as_they_like(small_model, begin, decoding):
    """Each has the tokens that it has alone, and a state of its own at every moment."""
    kinds = [
        (20, Sampler(seed=1), 12),
        (33, Sampler(temperature=0), 5),
        (47, Sampler(0.8, top_p=0.9, seed=2), 30),
        (60, Sampler(min_p=0.05, seed=3), 9),
    ]
    want = [
        [t for t, _ in one_by_one(small_model, begin(n, s, max_tokens=m), m)] for n, s, m in kinds
    ]
    sequences = [begin(n, s, max_tokens=m) for n, s, m in kinds]
    got = {id(sequence): [] for sequence in sequences}
    for number in range(40):
        if number < 8 and number % 2 == 0:
            join(decoding, sequences[number // 2])
        if number == 9:
            decoding.remove(sequences[2])
        if number == 12:
            decoding.add(sequences[2])
        for taken in decoding.step() if decoding else []:
            got[id(taken.sequence)].append(taken.token)
        for sequence in sequences:
            assert not sequence.drawn or sequence.fed == sequence.tokens[:-1]
    assert not decoding and all(sequence.reason for sequence in sequences)
    assert list(got.values()) == want


def test_prompts_are_taken_between_steps(small_model, begin, decoding):
    """A chunk of a long one, a token of the others, and so on."""
    first, second = begin(30), begin(200)
    want = [[t for t, _ in one_by_one(small_model, begin(n), 12)] for n in (30, 200)]
    join(decoding, first)
    chunks, told = prefill_chunks(small_model, second.pending, second.state, 64), []
    while True:
        try:
            told.append(next(chunks))
        except StopIteration as end:
            decoding.add(second, end.value)
            break
        decoding.step()
        assert second.state.offset == told[-1]
    assert told == [64, 128, 192, 200]
    for _ in range(12):
        decoding.step()
    assert first.tokens[30:42] == want[0] and second.tokens[200:] == want[1]


def test_who_cannot_join_is_told(small_model, begin, decoding):
    sequences = [begin(20 + n) for n in range(9)]
    for sequence in sequences[:8]:
        join(decoding, sequence)
    with pytest.raises(DataError, match="8 sequences go on already"):
        decoding.add(sequences[8])
    decoding.remove(sequences[0])
    with pytest.raises(DataError, match="goes on already"):
        decoding.add(sequences[1])
    with pytest.raises(DataError, match="has ended"):
        decoding.add(begin(max_tokens=0))
    join(decoding, sequences[8])
    assert len(decoding.step()) == 8 and decoding.sequences == sequences[1:]


# Log-probabilities, and memory


def test_log_probabilities_may_be_read_when_all_is_done(small_model, small_tokenizer):
    seen = list(stream_generate(small_model, small_tokenizer, IDS[:40], 6))
    ids = IDS[:40] + tokens_of(seen)
    logits = small_model(mx.array([ids]))[0, 39:-1]
    want = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    got = np.array([np.array(response.logprobs) for response in seen])
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert seen[0].logprobs is seen[0].logprobs
    with pytest.raises(FrozenInstanceError):
        seen[0].logprobs = mx.zeros(288)
    assert "array" not in repr(seen[0])


def test_no_step_is_held_longer_than_the_next(small_model, begin, decoding):
    """However many tokens there are, the memory between two of them is the same."""
    sequence = begin(40, Sampler(temperature=0), max_tokens=100)
    sequence.state.boundaries.spacing = Spacing()  # records do take memory
    join(decoding, sequence)
    used = []
    for _ in range(80):
        decoding.step()
        mx.synchronize()
        used.append(mx.get_active_memory())
    assert max(used[40:]) - max(used[10:40]) < 10_000


@pytest.mark.parametrize("length", [64, 131, 255])
def test_a_state_from_a_store_goes_back_as_well(small_model, begin, decoding, tmp_path, length):
    """It holds no more rows than its own length needs."""
    with KVStore(tmp_path, model=small_model) as store:
        saved = begin(length).state
        prefill(small_model, IDS[:length], saved)
        store.save(IDS[:length], saved)
        states = [store.restore(IDS[:length])[0] for _ in range(2)]
    first, second = begin(length + 1), begin(length + 1)
    first.state, second.state = states
    want = one_by_one(small_model, first, 6)
    join(decoding, second)
    for token, state in want:
        assert decoding.step()[0].token == token
        assert shown(second.state) == state
