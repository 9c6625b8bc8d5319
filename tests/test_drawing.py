"""What draws depend on beside the logits: rules, penalties, thoughts that have to end; and the guard."""

import json

import mlx.core as mx
import numpy as np
import pytest
from ahead import join
from hypothesis import given
from hypothesis import strategies as st
from steering import Dictation

from ds4mlx import DataError
from ds4mlx.chat.tokens import DSML, THINK, THINK_END
from ds4mlx.engine.decoding import Decoding
from ds4mlx.engine.penalties import LookBack, Penalties
from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.repetition import LEAST, LONGEST, TIMES, Repetition
from ds4mlx.engine.rules import Mask, Rule
from ds4mlx.engine.sampling import Sampler
from ds4mlx.engine.schemas import json_schema
from ds4mlx.engine.sequence import Sequence
from ds4mlx.engine.step import draw, step
from ds4mlx.engine.tool_rules import tool_calls

SHORT = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    },
    "required": ["colour", "sizes"],
    "additionalProperties": False,
}


@pytest.fixture
def begin(talker):
    """A sequence of the random model behind a prompt in text."""
    model, tokenizer = talker

    def made(text="a b", **options):
        return Sequence(tokenizer.encode(text), model.make_cache(), tokenizer, **options)

    return made


def decoded(model, *sequences, between=lambda: None):
    """Decode these together to their end."""
    decoding = Decoding(model)
    for sequence in sequences:
        join(decoding, sequence)
    while decoding:
        for taken in decoding.step():
            if taken.error:
                raise taken.error
        between()


def alone(model, sequence):
    """The drawn tokens where nothing is ahead."""
    tokens = draw([sequence], prefill(model, sequence.pending, sequence.state))
    while True:
        sequence.take(tokens[0])
        if sequence.reason:
            return sequence.tokens[-sequence.drawn :]
        tokens, _ = step(model, [sequence])


# Penalties


def reference(logits, prompt, drawn, penalties):
    """The penalties by their definitions, token by token."""
    result = logits.astype(np.float64)
    for token in range(len(logits)):
        if token in [*prompt, *drawn][-penalties.window :][: penalties.window]:
            by = penalties.repetition
            result[token] = result[token] / by if result[token] > 0 else result[token] * by
        count = drawn.count(token)
        result[token] -= count * penalties.frequency + (count > 0) * penalties.presence
    return result


TOKENS = st.lists(st.integers(0, 11), max_size=30)


@given(
    st.integers(0, 2**32 - 1),
    TOKENS,
    TOKENS,
    st.builds(
        Penalties,
        st.floats(-2, 2),
        st.floats(-2, 2),
        st.floats(0.5, 2),
        st.integers(1, 40),
    ),
)
def test_penalties_are_the_defined_ones(seed, prompt, drawn, penalties):
    logits = np.random.default_rng(seed).normal(0, 4, (1, 12)).astype(np.float32)
    back = LookBack(penalties, prompt)
    for token in drawn:
        back.add(token)
    given_logits = mx.array(logits)
    got = np.array(back.penalised(given_logits))
    np.testing.assert_allclose(
        got[0], reference(logits[0], prompt, drawn, penalties), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(np.array(given_logits), logits)


def test_no_window_is_no_repetition_penalty():
    logits = mx.array([[1.0, 2.0]])
    assert LookBack(Penalties(repetition=2, window=0), [0, 1]).penalised(logits).tolist() == [
        [1, 2]
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"frequency": 2.1},
        {"presence": float("nan")},
        {"presence": "1"},
        {"repetition": 0},
        {"repetition": float("inf")},
        {"window": -1},
        {"window": 1.5},
    ],
)
def test_penalties_out_of_range_are_refused(wrong):
    with pytest.raises(DataError, match=f"{next(iter(wrong))} must be a"):
        Penalties(**wrong)


# Draws that wait for the token before


OPTIONS = {
    "rule": lambda: {"rule": json_schema(SHORT), "sampler": Sampler(seed=3), "max_tokens": 80},
    "rule behind a thought": lambda: {
        "rule": json_schema(SHORT),
        "sampler": Sampler(seed=4),
        "thinking_budget": 5,
        "max_tokens": 80,
    },
    "penalties": lambda: {
        "sampler": Sampler(0.3, seed=5, penalties=Penalties(1.5, 0.5, 1.3, 8)),
        "max_tokens": 12,
    },
    "penalties, greedy": lambda: {
        "sampler": Sampler(temperature=0, penalties=Penalties(repetition=5.0)),
        "max_tokens": 12,
    },
    "budget": lambda: {"sampler": Sampler(seed=6), "thinking_budget": 4, "max_tokens": 8},
    "plain": lambda: {"sampler": Sampler(seed=7), "max_tokens": 8},
}


def test_tokens_are_those_of_each_alone_and_without_a_step_ahead(talker, begin):
    """All in one step, whether they wait or not."""
    prompts = {
        name: f"<think>x{len(name)}" if "thought" in name or name == "budget" else "a b"
        for name in OPTIONS
    }
    want = {
        name: alone(talker[0], begin(prompts[name], **make())) for name, make in OPTIONS.items()
    }
    together = {name: begin(prompts[name], **make()) for name, make in OPTIONS.items()}
    decoded(talker[0], *together.values())
    assert {name: s.tokens[-s.drawn :] for name, s in together.items()} == want
    for name in ("rule", "rule behind a thought"):
        answer = together[name].text.split(THINK_END)[-1]
        assert together[name].reason == "stop"
        values = json.loads(answer)
        assert values["colour"] in ("red", "green") and 2 <= len(values["sizes"]) <= 4
    assert len(set(want["penalties, greedy"])) == 12


def test_a_step_is_submitted_ahead_where_the_draw_waits(talker, begin, monkeypatch):
    """The model has been asked for the next logits when a token is read."""
    calls, usual = [], talker[0].last_logits
    monkeypatch.setattr(type(talker[0]), "last_logits", lambda *a: calls.append(1) or usual(*a[1:]))
    decoding = Decoding(talker[0])
    join(decoding, begin(rule=json_schema(SHORT), max_tokens=4))
    before, counts = len(calls), []
    while decoding:
        decoding.step()
        counts.append(len(calls) - before)
    assert counts == [1, 2, 3, 3]


def test_a_rule_that_asks_too_much_ends_only_its_sequence(talker, begin):
    """Its state is that of its tokens but the last, as wherever a step fails."""
    lark = "start: TEXT\nTEXT: /((.{0,500}){0,500}x)*/"
    failing = begin(rule=Rule(lark, "the test's rule"), sampler=Sampler(seed=1), max_tokens=24)
    other = begin(sampler=Sampler(seed=2), max_tokens=24)
    want = alone(talker[0], begin(sampler=Sampler(seed=2), max_tokens=24))
    decoding, errors = Decoding(talker[0]), []
    for sequence in (failing, other):
        join(decoding, sequence)
    while decoding:
        errors += [taken for taken in decoding.step() if taken.error]
    assert [taken.sequence for taken in errors] == [failing]
    assert "the test's rule cannot be followed" in str(errors[0].error)
    assert failing.reason is None and failing.fed == failing.tokens[:-1]
    assert other.tokens[-24:] == want


def test_a_tokenizer_without_the_mark_cannot_follow_rules_of_tools(small_tokenizer):
    assert small_tokenizer.convert_tokens_to_ids(DSML) is None
    with pytest.raises(DataError, match="choice of tools cannot be followed: the tokenizer has no"):
        tool_calls([{"type": "function", "function": {"name": "f"}}]).start(small_tokenizer)


# Thoughts


@pytest.mark.parametrize("budget", [0, 1, 2, 7])
def test_a_thought_ends_when_its_budget_is_spent(talker, begin, budget):
    model, tokenizer = talker
    end = tokenizer.convert_tokens_to_ids(THINK_END)
    free = begin("x<think>", sampler=Sampler(seed=8), max_tokens=12)
    bound = begin("x<think>", sampler=Sampler(seed=8), max_tokens=12, thinking_budget=budget)
    decoded(model, free)
    decoded(model, bound)
    assert end not in free.tokens
    assert bound.tokens[-12:][: budget + 1] == [*free.tokens[-12:][:budget], end]
    assert bound.thought_tokens == budget and not bound.thinking
    assert free.thought_tokens == 12 and free.thinking


def test_a_thought_that_is_opened_again_has_nothing_left(talker, begin):
    tokenizer = talker[1]
    think, end = map(tokenizer.convert_tokens_to_ids, (THINK, THINK_END))
    tokens = [70, 71, end, 72, think, 73, think, 74, 75]
    sequence = begin("<think>", sampler=Dictation(tokens), thinking_budget=2, max_tokens=8)
    for token in tokens[:5]:
        assert sequence._thought.must_close == (token == end)
        sequence.take(token)
    assert sequence._thought.must_close
    assert sequence.draw(mx.zeros((1, 100))).item() == end
    assert sequence.thought_tokens == 2


@pytest.mark.parametrize("after", [1, 3])
def test_a_running_thought_is_ended_at_the_next_token(talker, begin, after):
    model, tokenizer = talker
    end = tokenizer.convert_tokens_to_ids(THINK_END)
    sequence = begin("x<think>", sampler=Sampler(seed=9), max_tokens=10)
    other = begin("x<think>", sampler=Sampler(seed=9), max_tokens=10)
    want = alone(model, begin("x<think>", sampler=Sampler(seed=9), max_tokens=10))

    def between():
        if sequence.drawn == after:
            sequence.end_thinking()

    decoded(model, sequence, other, between=between)
    assert sequence.tokens[-10:][: after + 1] == [*want[:after], end]
    assert sequence.thought_tokens == after and sequence.drawn == 10
    assert other.tokens[-10:] == want


def test_ending_what_is_no_thought_changes_nothing(talker, begin):
    sequence = begin("x", sampler=Sampler(seed=9), max_tokens=6)
    sequence.end_thinking()
    assert not sequence.waits
    decoded(talker[0], sequence)
    assert sequence.tokens[-6:] == alone(
        talker[0], begin("x", sampler=Sampler(seed=9), max_tokens=6)
    )


def test_a_thought_before_a_rule_is_closed_and_never_cut_short(talker, begin):
    """The end of the sentence is not drawn inside it, however probable."""
    sequence = begin("<think>", rule=json_schema(SHORT), thinking_budget=3)
    logits = np.zeros((1, talker[0].args.vocab_size), np.float32)
    logits[0, sequence._end_token] = 50
    drawn = sequence.draw(mx.array(logits)).item()
    assert drawn != sequence._end_token


@pytest.mark.parametrize("budget", [-1, 1.5, "3", True])
def test_a_budget_that_is_no_count_is_refused(begin, budget):
    with pytest.raises(DataError, match="thinking_budget must be a whole number"):
        begin(thinking_budget=budget)


# Ends


def test_an_answer_that_goes_in_circles_is_ended(begin):
    circle = [80, 81, 82]
    tokens = [70, 71, *circle * 400]
    guarded = begin(sampler=Dictation(tokens), guard=True, max_tokens=1100)
    for token in tokens:
        guarded.take(token)
        if guarded.reason:
            break
    assert guarded.reason == "repetition" and guarded.drawn == 2 + len(circle) + LEAST
    free = begin(sampler=Dictation(tokens), max_tokens=1100)
    for token in tokens[:1100]:
        free.take(token)
    assert free.reason == "length"


@given(st.data())
def test_the_guard_tells_circles_from_texts(data):
    period = data.draw(st.integers(1, LONGEST))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    piece = random.permutation(1000)[:period].tolist()
    guard, start = Repetition(), random.integers(2000, 3000, 50).tolist()
    assert not any(guard.add(token) for token in start)
    enough = period + max(LEAST, period * (TIMES - 1))
    told = [guard.add(piece[place % period]) for place in range(enough)]
    assert told.index(True) == enough - 1
    assert not guard.add(5000)  # it went on to something else


def test_which_stop_string_ended_an_answer(talker, begin):
    tokenizer = talker[1]
    for text, stops, found in [
        ("one END two", ("END", "two"), "END"),
        ("one two END", ("ENDING", "END", "D"), "END"),
        ("none", ("END",), None),
    ]:
        sequence = begin(sampler=Dictation([]), stop=stops)
        for token in [*tokenizer.encode(text), tokenizer.eos_token_id]:
            if not sequence.reason:
                sequence.take(token)
        assert sequence.reason == "stop" and sequence.stopped_by == found


def test_a_mask_is_told_of_tokens_outside_thoughts_only(talker, begin, monkeypatch):
    _, tokenizer = talker
    told, usual = [], Mask.took
    monkeypatch.setattr(Mask, "took", lambda self, token: told.append(token) or usual(self, token))
    sequence = begin("<think>", rule=json_schema(SHORT))
    for token in [*tokenizer.encode("so</think>"), *tokenizer.encode('{"')]:
        sequence.take(token)
    assert told == tokenizer.encode('{"')
