"""Drafts: the text, the draws and the states are those without them, wherever an answer ends."""

from itertools import islice

import drafting
import mlx.core as mx
import numpy as np
import pytest
from ahead import IDS, NEAR, shown
from drafting import CRITICAL_7, Flipping, always, chi_squared, tokens
from steering import InterruptAt, text_of, tokens_of

from ds4mlx import DataError, Model, generate, load, stream_generate
from ds4mlx.config import ModelConfig
from ds4mlx.engine.decoding import Decoding
from ds4mlx.engine.generation import answer
from ds4mlx.engine.penalties import Penalties
from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.proposals import drawn, propose
from ds4mlx.engine.sampling import Sampler, draw_key
from ds4mlx.engine.sequence import Sequence
from ds4mlx.engine.speculative import Speculation
from ds4mlx.model.fused.choice import launches
from ds4mlx.model.taps import Listener, listening


@pytest.fixture(scope="module")
def model(small_dir):
    return drafting.noisy(small_dir)


@pytest.fixture(scope="module")
def writer(embedded_dir):
    return drafting.trained(embedded_dir)


@pytest.fixture
def sequence(model, small_tokenizer):
    def made(start=0, length=40, max_tokens=24, near=False, **options):
        state = model.make_cache()
        if near:
            state.boundaries.spacing = NEAR
        ids = IDS[start : start + length]
        return Sequence(ids, state, small_tokenizer, max_tokens=max_tokens, **options)

    return made


def speculation(model, sequence, drafts=3, bypass=None):
    """One whose prompt has been read."""
    made = Speculation(model, sequence, drafts, bypass)
    made.add(prefill(model, sequence.pending, sequence.state, on_streams=made.saw), 0)
    return made


# What comes out


@pytest.mark.parametrize("drafts", [1, 3])
def test_greedy_text_is_the_same(model, sequence, drafts):
    """Of a draft block of noise, with drafts always or now and then."""
    for start, length in ((0, 1), (5, 140)):
        asked = start, length, 16
        want = tokens(model, sequence(*asked))
        assert tokens(model, sequence(*asked), drafts) == want
        assert tokens(model, sequence(*asked), drafts, Flipping(3, -2, 1, -1)) == want


def test_a_trained_draft_block_is_mostly_right(writer):
    """It would not be if a position were paired with another token, or with another's streams.

    Also where tokens in between were not drafted: the block has read them all the same.
    """
    model, tokenizer = writer
    ids, seen = tokenizer.encode("def is_prime(n):\n    "), []
    for drafts, bypass in ((0, None), (2, always()), (1, Flipping(1, -9, 100))):
        one = Sequence(ids, model.make_cache(), tokenizer, max_tokens=24)
        seen.append(list(answer(model, one, drafts=drafts, bypass=bypass)))
    assert tokens_of(seen[0]) == tokens_of(seen[1]) == tokens_of(seen[2])
    assert seen[0][-1].drafted_tokens == 0
    for last in (seen[1][-1], seen[2][-1]):
        assert last.accepted_tokens > 0.4 * last.drafted_tokens > 3


def test_steps_by_launches_and_rounds_take_turns(small_dir, small_tokenizer):
    """Rows of the former lie in tails, those of the latter in buffers; the streams are handed on."""
    model = load(small_dir, dtype=mx.float32, rounding="none")[0]
    runs, ids = [], IDS[:120]
    with launches():
        for drafts, bypass in ((0, None), (2, Flipping(-3, 2, -1, 3))):
            one = Sequence(ids, model.make_cache(), small_tokenizer, max_tokens=14)
            runs.append(list(answer(model, one, drafts=drafts, bypass=bypass)))
    assert tokens_of(runs[0]) == tokens_of(runs[1]) and runs[1][-1].drafted_tokens > 4
    states = [model.make_cache() for _ in range(2)]
    for state in states:
        prefill(model, ids, state)
    with launches():
        _, streams = model.last([[7]], states[:1])
    want = model.streams([[7]], states[1:])[0]
    np.testing.assert_allclose(np.array(streams), np.array(want), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(seed=3),
        Sampler(0.7, top_p=0.9, top_k=20, seed=4),
        Sampler(seed=5, penalties=Penalties(repetition=1.3, presence=0.5)),
        Sampler(0, penalties=Penalties(repetition=1.5)),
    ],
)
def test_draws_that_repeat_are_the_same(model, sequence, sampler):
    want = tokens(model, sequence(max_tokens=12, sampler=sampler))
    assert tokens(model, sequence(max_tokens=12, sampler=sampler), 3) == want


@pytest.mark.parametrize("sampler", [Sampler(1.3), Sampler(0.8, top_p=0.9, top_k=6, min_p=0.02)])
def test_accepted_and_replaced_draws_have_the_models_distribution(sampler):
    logits, draft = (mx.array(row) for row in np.random.default_rng(1).normal(size=(2, 1, 8)) * 1.5)
    p = np.exp(np.array(sampler.log_probs(logits)))[0]
    made, count = [], 400
    for number in range(count):
        key = draw_key(7, number)
        made.append(drawn(sampler, logits, key, propose(sampler, draft, key, True)))
    seen, kept = np.bincount(np.array(mx.concatenate(made)), minlength=8), p > 0
    assert not seen[~kept].any()
    assert chi_squared(seen[kept], count * p[kept]) < CRITICAL_7


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_draft_that_is_no_number_changes_nothing(broken):
    """Its proposals are as good as any others."""
    sampler, logits = Sampler(), mx.array([[0.0, 50.0, 0.0]])
    for alone in (False, True):
        key = draw_key(1, 1)
        offered = propose(sampler, mx.full((1, 3), broken), key, alone)
        assert drawn(sampler, logits, key, offered).item() == 1


def test_a_samplers_log_probabilities_are_those_of_its_candidates():
    logits = mx.random.normal((2, 50), key=mx.random.key(0))
    for sampler in (Sampler(0.5), Sampler(top_k=3), Sampler(top_p=0.5), Sampler(2, min_p=0.1)):
        ids, want = sampler.candidates(logits)
        got = mx.take_along_axis(sampler.log_probs(logits), ids, axis=-1)
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-5)


# States


def test_every_state_between_two_tokens_is_the_one_without_drafts(model, sequence):
    """Over regular boundaries, thinned ones, and boundaries asked for, in the middle of rounds."""
    both = [sequence(length=100, max_tokens=42, near=True) for _ in range(2)]
    for each in both:
        for position in (1, 9, 12, 33):
            each.state.add_boundary(100 + position)
    decoding = Decoding(model)
    decoding.add(both[0], prefill(model, both[0].pending, both[0].state))
    ours = speculation(model, both[1], bypass=Flipping(9, -1))
    for _ in range(42):
        want, got = decoding.step()[0], ours.step()
        assert (got.token, got.text) == (want.token, want.text)
        *alike, bits = shown(both[0].state)
        *same, others = shown(both[1].state)
        assert alike[:4] == same[:4] and both[1].fed == both[1].tokens[:-1]
        for one, other in zip(bits, others, strict=True):
            np.testing.assert_allclose(values(other), values(one), atol=1e-3)
    assert ours.drafted.accepted and ours.drafted.rounds > 10


class Deaf(Listener):
    def wants(self, name):
        return False


def values(raw):
    return np.frombuffer(raw, np.float32)


@pytest.mark.parametrize("after", [3, 8])
@pytest.mark.parametrize("what", ["rewind", "weight", "boundary", "listen"])
def test_what_is_changed_between_two_tokens_counts_at_once(model, sequence, what, after):
    sound, got = model.norm.weight, []
    for drafts in (0, 3):
        one, kept = sequence(max_tokens=14), []
        run = answer(model, one, drafts=drafts, bypass=always())
        try:
            kept += tokens_of(islice(run, after))
            if what == "rewind":
                one.state.rewind(one.state.offset - 3)
            elif what == "weight":
                model.norm.weight = sound * -1
            elif what == "boundary":
                one.state.add_boundary(one.state.offset + 1)
            else:
                with listening(Deaf()):
                    kept += tokens_of(islice(run, 2))
            kept += tokens_of(run)
        finally:
            model.norm.weight = sound
        got.append((kept, one.state.offset, sorted(one.state.records)))
    assert got[0] == got[1]


@pytest.mark.parametrize("drafts", [1, 3])
def test_ends_leave_what_was_given_out(model, small_tokenizer, drafts):
    """A stop string, the longest answer, an iterator that is closed; in or after a round."""

    def run(drafts, count=None, **options):
        one = Sequence(IDS[:30], model.make_cache(), small_tokenizer, **options)
        made = answer(model, one, drafts=drafts, bypass=always())
        seen = list(islice(made, count))
        made.close()
        assert one.state.offset == 30 + len(seen) - 1 and one.fed == one.tokens[:-1]
        return tokens_of(seen), text_of(seen), seen[-1].finish_reason

    text = run(0, max_tokens=12)[1]
    stops = [{"stop": text[at : at + 3], "max_tokens": 12} for at in (3, 6)]
    for options in (*stops, *({"max_tokens": most} for most in (1, 6, 7))):
        assert run(drafts, **options) == run(0, **options)
    for count in (1, 4):
        assert run(drafts, count, max_tokens=12) == run(0, count, max_tokens=12)


def test_ctrl_c_leaves_a_state_that_goes_on(model, sequence):
    want = tokens(model, sequence(max_tokens=14))
    with InterruptAt(0) as all_calls:
        tokens(model, sequence(max_tokens=14), 3)
    for number in range(all_calls.count // 3, all_calls.count, all_calls.count // 5):
        one, seen = sequence(max_tokens=14), []
        with pytest.raises(KeyboardInterrupt), InterruptAt(number):
            for response in answer(model, one, drafts=3, bypass=always()):
                seen.append(response.token)
        assert {layer.offset for layer in one.state} == {one.state.offset}
        assert one.tokens[40:][: len(seen)] == seen == want[: len(seen)]
        assert one.fed == one.tokens[: one.state.offset]
        if one.reason is None and one.pending:
            assert one.tokens[40:] + tokens(model, one, 2) == want


def test_logits_that_are_not_finite_are_told(small_dir, small_tokenizer):
    """By the same error, with the state before the step that failed."""
    told = []
    for drafts in (0, 3):
        model = load(small_dir, dtype=mx.float32, rounding="none")[0]
        one = Sequence(IDS[:20], model.make_cache(), small_tokenizer, max_tokens=30)
        run = answer(model, one, drafts=drafts, bypass=always())
        tokens_of(islice(run, 6))
        model.layers[1].attn_norm.weight = model.layers[1].attn_norm.weight * np.nan
        with pytest.raises(DataError, match="layer 1 is the first") as error:
            next(run)
        told.append((str(error.value), one.state.offset))
    assert told[0] == told[1]


# What is refused


def test_what_is_refused(model, small_tokenizer):
    for wrong in (4, -1, 1.5, True):
        with pytest.raises(DataError, match="drafts must be"):
            stream_generate(model, small_tokenizer, [3, 4], drafts=wrong)
    changes = {"num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 128]}
    bare = Model(ModelConfig(**{**vars(model.args), **changes}))
    with pytest.raises(DataError, match="no draft block"):
        stream_generate(bare, small_tokenizer, [3, 4], drafts=1)
    assert generate(model, small_tokenizer, [3, 4], 4, drafts=2) == generate(
        model, small_tokenizer, [3, 4], 4
    )
