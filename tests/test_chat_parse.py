"""The message in a completion: official output exactly, everything else without failing."""

import json
import re
from pathlib import Path

import pytest
from chat_messages import ARGUMENTS, BLOCK, EOS, assistant, call, calls_of, user
from chat_spellings import PIECES
from hypothesis import example, given
from hypothesis import strategies as st

from ds4mlx.chat import encode_messages, parse_completion, split_reasoning
from ds4mlx.errors import DataError

DATA = Path(__file__).parent / "data" / "encoding"
NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)


def check_shape(message):
    assert set(message) == {
        *("role", "content", "reasoning_content", "tool_calls", "malformed"),
    }
    assert isinstance(message["content"], str)
    assert isinstance(message["reasoning_content"], str)
    for entry in message["tool_calls"]:
        assert re.fullmatch("call_[0-9a-f]{32}", entry["id"])
        assert isinstance(json.loads(entry["function"]["arguments"]), dict)
    assert all(isinstance(fault, str) for fault in message["malformed"])


def test_thinking_with_calls():
    message = parse_completion(f"hm\n</think>Let me see.\n\n{BLOCK}{EOS}", "high")
    expected = assistant("Let me see.", reasoning_content="hm\n")
    expected |= {"tool_calls": [call(message["tool_calls"][0]["id"], ARGUMENTS)], "malformed": []}
    assert message == expected


@pytest.mark.parametrize("ending", ["", EOS])
def test_plain_answer(ending):
    message = parse_completion("\n4 & <b>\n" + ending)
    assert message == {
        **assistant("\n4 & <b>\n", reasoning_content=""),
        "tool_calls": [],
        "malformed": [],
    }


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_official_turns(number):
    case = json.loads((DATA / f"test_input_{number}.json").read_text(encoding="utf-8"))
    sent = [m for m in (case["messages"] if number == 1 else case) if m["role"] == "assistant"]
    prompt = (DATA / f"test_output_{number}.txt").read_text(encoding="utf-8")
    turns = [turn.split("<｜User｜>")[0] for turn in prompt.split("<｜Assistant｜>")[1:]]
    for message, turn in zip(sent, turns, strict=True):
        thinking = "high" if turn.startswith("<think>") else "none"
        text = turn.removeprefix("<think>").removeprefix("</think>").removeprefix("<｜action｜>")
        parsed = parse_completion(text, thinking)
        assert parsed["malformed"] == []
        assert parsed["content"] == message.get("content", "")
        if thinking == "high":
            assert parsed["reasoning_content"] == message["reasoning_content"]
        assert calls_of(parsed) == [
            (c["function"]["name"], c["function"]["arguments"])
            for c in message.get("tool_calls", [])
        ]


# Markup in a value or a text is legal until it holds the tag that ends it.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: "DSML" not in text
)
PLAIN = TEXT.filter(lambda text: "<" not in text)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner | TEXT, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)
KEYS = TEXT.filter(lambda key: '" string="' not in key)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(KEYS, JSON | TEXT, max_size=4)), max_size=3)


@given(PLAIN, PLAIN, CALLS, st.sampled_from(["none", "high"]))
def test_round_trip(reasoning, content, calls, thinking):
    sent = assistant(content, reasoning_content=reasoning if thinking == "high" else "")
    sent["tool_calls"] = [
        call(f"call_{i}", json.dumps(arguments, ensure_ascii=False), name)
        for i, (name, arguments) in enumerate(calls)
    ]
    history = [user("u")]
    start = encode_messages(history, thinking)
    text = encode_messages([*history, sent], thinking).removeprefix(start)
    message = parse_completion(text, thinking)
    for given_call, parsed in zip(sent["tool_calls"], message["tool_calls"], strict=True):
        given_call["id"] = parsed["id"]
    assert message == {**sent, "malformed": []}
    assert encode_messages([*history, message], thinking) == start + text


def test_text_after_the_calls_is_kept():
    message = parse_completion(f"a\n\n{BLOCK}\n\nb\n\n{BLOCK}{EOS}")
    assert len(message["tool_calls"]) == 1
    assert message["content"] == f"a\n\nb\n\n{BLOCK}"
    assert "text after the tool calls" in message["malformed"]


def test_nothing_after_the_end_counts():
    message = parse_completion(f"a{EOS}b\n\n{BLOCK}")
    assert (message["content"], message["tool_calls"]) == ("a", [])
    assert message["malformed"] == ["text after the end of the turn"]
    message = parse_completion(f"r{EOS}</think>b", "high")
    assert (message["reasoning_content"], message["content"]) == ("r", "")


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("r</think>b", "high", ("r", "b")),
        ("r", "low", ("r", "")),
        ("<think>r</think>b", "max", ("r", "b")),
        ("</think>b", "high", ("", "b")),
        ("r</think>b</think>c", "high", ("r", "b</think>c")),
        ("b", "none", ("", "b")),
        ("<think>r</think>b", "none", ("r", "b")),
        ("<think>b", "none", ("", "<think>b")),
        ("a</think>b", "none", ("", "a</think>b")),
        ("", "high", ("", "")),
    ],
)
def test_split_reasoning(text, thinking, expected):
    assert split_reasoning(text, thinking) == expected


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("r", "high", ("r", "", ["missing </think>"])),
        ("<think>r</think>b", "high", ("r", "b", ["<think> repeated"])),
        ("<think>r</think>b", "none", ("r", "b", ["reasoning although thinking is off"])),
        ("<think></think>b", "none", ("", "b", ["reasoning although thinking is off"])),
        ("</think>b", "none", ("", "b", ["</think> inside the content"])),
        ("r</think>b<｜User｜>", "high", ("r", "b", ["<｜User｜> inside the content"])),
        ("r<think></think>b", "high", ("r", "b", ["<think> inside the reasoning"])),
        ("a｜DSML｜", "none", ("", "a｜DSML｜", ["tool markup inside the content"])),
    ],
)
def test_wrong_markers(text, thinking, expected):
    message = parse_completion(text, thinking)
    parts = ("reasoning_content", "content", "malformed")
    assert tuple(message[part] for part in parts) == expected


@pytest.mark.parametrize("ending", ["", EOS, "\n", "</think>", "</think>" + EOS, "\n</think>\n"])
@pytest.mark.parametrize("reasoning", ["r", "", "I call f.\nNow"])
def test_calls_that_end_the_turn_end_the_reasoning(reasoning, ending):
    message = parse_completion(f"{reasoning}\n\n{BLOCK}{ending}", "high")
    assert (message["reasoning_content"], message["content"]) == (reasoning, "")
    assert calls_of(message) == [("f", ARGUMENTS)]
    assert message["malformed"][0] == "tool calls before </think>"


@pytest.mark.parametrize("ending", ["</think>b", " or not", "</think>\n\n" + BLOCK])
def test_calls_inside_the_reasoning_stay_there(ending):
    message = parse_completion(f"r\n\n{BLOCK}{ending}", "high")
    if BLOCK in ending:
        assert len(message.pop("tool_calls")) == 1
        message |= {"tool_calls": []}
    assert message["tool_calls"] == []
    assert message["reasoning_content"] == f"r\n\n{BLOCK}" + ending.partition("</think>")[0]
    assert "tool markup inside the reasoning" in message["malformed"]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=25).map("".join))
@example("")
@example(f"<tool_calls>\n\n{BLOCK}")
def test_any_text_gives_a_message(text):
    for thinking in ("none", "high"):
        message = parse_completion(text, thinking)
        check_shape(message)
        assert EOS not in message["content"] + message["reasoning_content"]
        if not message["malformed"]:
            start = encode_messages([user("u")], thinking)
            encoded = encode_messages([user("u"), message], thinking).removeprefix(start)
            again = parse_completion(encoded, thinking)
            assert again["malformed"] == []
            assert meaning(again) == meaning(message)


def meaning(message):
    calls = [(name, json.loads(arguments)) for name, arguments in calls_of(message)]
    return message["content"], message["reasoning_content"], calls


def test_half_a_surrogate_pair_is_kept():
    assert parse_completion("a\ud800")["content"] == "a\ud800"


def test_unknown_thinking_is_refused():
    with pytest.raises(DataError, match="thinking must be one of none, low, high, max"):
        parse_completion("a", "medium")
