"""Where an answer ends: at a stop string, at the end of the sentence, at its length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steering import Dictation, text_of

from ds4mlx import DataError, generate, stream_generate
from ds4mlx.text.stops import StopStrings

PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def answer(talker):
    """What follows from dictated text, not from the model's noise."""

    def dictate(text, *arguments, end=True, prompt="x", **options):
        tokens = text if isinstance(text, list) else talker[1].encode(text)
        tokens = [*tokens, talker[1].eos_token_id] if end else tokens
        draws = Dictation(tokens)
        return list(stream_generate(*talker, prompt, *arguments, sampler=draws, **options))

    return dictate


# Stop strings

LETTERS = st.text("ab\U0001f98a", max_size=30)


@given(LETTERS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_text_is_cut_before_the_stop_that_is_complete_first(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    hold, shown = StopStrings(stops), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += hold.add(text[start:end])
        assert not any(stop in shown for stop in stops)
        if hold.reached:
            break
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert hold.reached == bool(ends)
    assert shown + hold.finish() == (text[: min(ends)[1]] if ends else text)


@given(LETTERS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_no_more_is_held_back_than_a_stop_may_need(text, stops):
    hold, shown = StopStrings(stops), ""
    for end, letter in enumerate(text, 1):
        shown += hold.add(letter)
        if hold.reached:
            return
        waiting = text[len(shown) : end]
        assert waiting == "" or any(stop.startswith(waiting) for stop in stops)


@given(st.text("ab\n<", max_size=20), st.text("ab\n<", max_size=9), st.data())
def test_stops_are_looked_for_up_to_a_text_only(text, rest, data):
    until, strings = "\n\n<!", st.text("ab\n<!", min_size=1, max_size=4)
    stops = data.draw(st.lists(strings, min_size=1, max_size=3))
    for whole in (text + until + rest, text):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
        hold, shown = StopStrings(stops, until), ""
        for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
            shown += "" if hold.reached else hold.add(whole[start:end])
        shown += "" if hold.reached else hold.finish()
        plain = StopStrings(stops)
        before = plain.add(text) + plain.finish()
        assert hold.found == plain.found
        assert shown == (before if plain.reached else whole)


def test_a_stop_across_tokens(answer):
    seen = answer("one two three four", stop=["o thr"])
    assert text_of(seen) == "one tw"
    assert seen[-1].finish_reason == "stop"
    assert {response.finish_reason for response in seen[:-1]} == {None}


def test_one_stop_may_be_given_as_a_text(answer):
    assert text_of(answer("one two", stop=" two")) == "one"


def test_a_stop_that_does_not_come_costs_nothing(answer):
    seen = answer("one two thr", stop=["three"])
    assert text_of(seen) == "one two thr" and seen[-1].finish_reason == "stop"
    cut = answer("one two thr", 3, stop=["one two three"])
    assert cut[-1].finish_reason == "length"
    assert "one two thr".startswith(text_of(cut)) and text_of(cut)


def test_a_stop_in_the_last_allowed_token_is_a_stop(answer):
    assert answer([*b"ab"], 2, end=False)[-1].finish_reason == "length"
    seen = answer("abc", end=True)
    assert answer("abc", len(seen) - 1, stop=["c"])[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "text", "shown"),
    [
        ("x<think>", "a STOP b</think>c STOP d", "a STOP b</think>c "),
        ("x<think>", "a STOP b</think>c", "a STOP b</think>c"),
        ("x<think>", "a STOP b", "a STOP b"),
        ("x<think>", "a ST</think>OP c", "a ST</think>OP c"),
        ("x<think>", "</think>STOP", "</think>"),
        ("x<think>begun", "a STOP b</think>STOP", "a STOP b</think>"),
        ("x<think>done</think>y<think>", "STOP</think>c STOP", "STOP</think>c "),
        ("x<think>done</think>", "a STOP b", "a "),
        ("x</think>", "a STOP b</think>c", "a "),
        ("x", "a STOP b</think>c", "a "),
        ("x", "a </think>STOP c", "a </think>"),
        ("x", "a <think>STOP</think> b STOP c", "a <think>STOP</think> b "),
        ("x", "ST<think>OP</think>STOP", "ST<think>OP</think>"),
        ("x", "a STOP<think>b", "a "),
        ("x<think>", "a<think>STOP</think>STOP", "a<think>STOP</think>"),
        ("x<think>", "STOP<｜User｜>STOP</think>STOP", "STOP<｜User｜>STOP</think>"),
    ],
)
def test_stops_are_looked_for_in_the_answer_and_not_in_the_thought(answer, prompt, text, shown):
    for stop in ("STOP", ["never", "STOP b and more", "STOP"]):
        seen = answer(text, prompt=prompt, stop=stop)
        assert text_of(seen) == shown and seen[-1].finish_reason == "stop"


def test_a_thought_that_is_spelled_in_letters_is_text(answer, talker):
    """Only the tokens open and close a thought."""
    spelled = [token for letter in "<think>" for token in talker[1].encode(letter)]
    assert text_of(answer("a STOP b", prompt=spelled, stop="STOP")) == "a "
    assert text_of(answer([*spelled, *talker[1].encode("STOP")], stop="STOP")) == "<think>"


@pytest.mark.parametrize(("length", "shown"), [(1, "a"), (2, "a ")])
def test_a_thought_may_end_for_its_length(answer, talker, length, shown):
    tokens = [*talker[1].encode("a"), *talker[1].encode(" "), *talker[1].encode("b")]
    seen = answer(tokens, length, prompt="x<think>", stop=[" b", "a c"])
    assert text_of(seen) == shown and seen[-1].finish_reason == "length"


def test_an_empty_stop_is_refused(talker):
    with pytest.raises(DataError, match="a stop string is empty"):
        stream_generate(*talker, PROMPT, stop=["a", ""])


# Ends


def test_the_end_of_the_sentence_ends_and_is_not_shown(answer, talker):
    seen = answer("done", 50)
    assert text_of(seen) == "done"
    assert seen[-1].finish_reason == "stop" and seen[-1].token == talker[1].eos_token_id


def test_special_tokens_other_than_the_end_are_shown(answer):
    assert text_of(answer("why</think>so")) == "why</think>so"


def test_length(talker):
    seen = list(stream_generate(*talker, PROMPT, max_tokens=4))
    assert [response.finish_reason for response in seen] == [None] * 3 + ["length"]
    assert [response.generation_tokens for response in seen] == [1, 2, 3, 4]
    assert {response.prompt_tokens for response in seen} == {len(talker[1].encode(PROMPT))}
    assert all(response.prompt_tps > 0 and response.generation_tps > 0 for response in seen)
    assert seen[-1].peak_memory > 0


def test_an_unfinished_character_shows_at_the_end(answer, talker):
    tokens = [t for t in range(3072) if talker[1].token_bytes(t) == b"\xe6"]
    assert text_of(answer(tokens)) == "\ufffd"
    assert [r.text for r in answer(tokens * 2, 2, end=False)] == ["", "\ufffd\ufffd"]


def test_no_tokens_feed_nothing(talker):
    cache = talker[0].make_cache()
    assert list(stream_generate(*talker, PROMPT, 0, cache=cache)) == []
    assert generate(*talker, PROMPT, 0) == "" and cache.offset == 0
