"""A completion read while it grows: what is given joined is what is read in the whole text."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from chat_messages import ARGUMENTS, BLOCK, CALL, EOS, block, invoke, parameter
from chat_spellings import BAD, HOSTILE, INSIDE, MENDED, PIECES, SLIPS
from fuzz_calls import completion, damage
from hypothesis import example, given
from hypothesis import strategies as st

from ds4mlx.chat import encode_messages, parse_completion
from ds4mlx.chat.deltas import CallArguments, CallEnd, CallStart, Content, Reasoning
from ds4mlx.chat.replay import sampled_calls
from ds4mlx.chat.streaming import Completion
from ds4mlx.errors import DataError

DATA = Path(__file__).parent / "data" / "encoding"


def pieces(text, cuts):
    edges = [0, *sorted(cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def stream(parts, thinking):
    reading = Completion(thinking)
    deltas = [delta for part in parts for delta in reading.add(part)]
    return reading, deltas, reading.finish()


def joined(deltas, kind):
    return "".join(delta.text for delta in deltas if isinstance(delta, kind))


def calls_of(deltas):
    """Id, name and arguments of the complete calls; each call is over before the next begins."""
    found, broken, index, start = [], 0, 0, None
    for delta in deltas:
        if isinstance(delta, CallStart):
            assert (start, delta.index) == (None, index)
            start, arguments = delta, ""
        elif isinstance(delta, CallArguments):
            assert start and delta.index == index and delta.text
            arguments += delta.text
        elif isinstance(delta, CallEnd):
            assert start and delta.index == index
            broken += delta.broken
            if not delta.broken:
                found.append((start.id, start.name, json.loads(arguments)))
            start, index = None, index + 1
    assert start is None
    return found, broken


def check(parts, thinking):
    """What the pieces give joined is the message in the whole text."""
    text = "".join(parts)
    reading, deltas, last = stream(parts, thinking)
    expected = parse_completion(text, thinking)
    calls, broken = calls_of([*deltas, *last])
    assert calls == [
        (c["id"], c["function"]["name"], json.loads(c["function"]["arguments"]))
        for c in reading.message["tool_calls"]
    ]
    for mine, other in zip(reading.message["tool_calls"], expected["tool_calls"], strict=True):
        other["id"] = mine["id"]
    assert reading.message == expected
    assert reading.sampled == sampled_calls(text, thinking)
    assert joined([*deltas, *last], Reasoning) == expected["reasoning_content"]
    content = joined([*deltas, *last], Content)
    if any(isinstance(delta, CallEnd) and delta.broken for delta in last):
        assert expected["content"].startswith(content)
    else:
        assert content == expected["content"]
    assert not broken or expected["malformed"]
    return deltas, last


HEAD = '<｜DSML｜invoke name="f"><｜DSML｜parameter name="x"'
CLOSE = "</｜DSML｜parameter></｜DSML｜invoke>"
BARE = '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>'
QUOTING = invoke("g", parameter("x", "é<｜DSML｜ </parameter> </think>"))
VALUES = [parameter(f"p{i}", v, "false") for i, v in enumerate(["1", "x", "[{}]"])]
TWICE = [parameter("x", "1"), parameter("y", "2"), parameter("x", "3")]
ODD = parameter('a"b', '\\ " \t \ud800 🦊')

OFFICIAL = [
    "\n4 & <b>\n",
    "",
    f"a{EOS}",
    f"a{EOS}b\n\n{BLOCK}",
    f"Let me see.\n\n{BLOCK}{EOS}",
    *(f"c\n\n{block(*calls)}" for calls in ((CALL, QUOTING, CALL), (QUOTING,), (BARE, CALL))),
    *(f"c\n\n{block(invoke('f', *values))}" for values in (VALUES, TWICE, [ODD], [])),
]
LAX = [
    *(f"c\n\n{markup}{EOS}" for markup, _ in [*SLIPS, *MENDED]),
    *(f"c\n\n{block(*calls)}{EOS}" for bad in BAD for calls in ((bad, CALL), (CALL, bad))),
    *(f"c{gap}{BLOCK}" for gap in ("", "\n", "\n\n\n")),
    *(f"c\n\n{BLOCK[:cut]}" for cut in range(20, len(BLOCK), 7)),
    f"a\n\n{BLOCK}\n\nb\n\n{BLOCK}{EOS}",
    f"c\n\n{BLOCK}\n\n{BLOCK}\n{INSIDE}",
    f'<tool_calls>\n<invoke name="g">\n</invoke>\n</tool_calls>\n\n{BLOCK}{EOS}',
    f'```\n<tool_calls>\n<invoke name="g">\n</invoke>\n</tool_calls>\n```\n\n{BLOCK}{EOS}',
    f'<|DSML|invoke name="g">\n</|DSML|invoke>\n\n{BLOCK}{EOS}',
    f'<tool_calls>\n<invoke name="w">\n<parameter name="t">{BLOCK}</parameter>\n</invoke>\n'
    f"</tool_calls>{EOS}",
    *(
        f"c\n\n{block(*calls)}"
        for calls in (
            (f'{HEAD}>v" string="true">w{CLOSE}',),
            (f'{HEAD} string="true">1</parameter></｜DSML｜invoke>', CALL),
            (f'{HEAD} string="true">1</parameter></｜DSML｜invoke>', BARE),
            (f'{HEAD} string="true">1', CALL),
        )
    ),
    '\n<invoke name="f">\n</invoke>\nto call.',
    "So: <invoke name='f'></invoke> <invoke the rest",
    '`<｜DSML｜invoke name="f">` and <｜DSML｜invoke name="$f"> or <｜DSML｜tool_calls> are tags',
    "a</think>b<｜User｜>\n\n<think>c\n\n",
]
REASONED = [
    "r",
    "r\n\n</think>\n\nb</think>c",
    "<think>r</think>b",
    f"r{EOS}</think>b",
    "r<think>a<｜User｜></think>b",
    *(
        f"r\n\n{BLOCK}{ending}"
        for ending in ("", EOS, "\n", "</think>" + EOS, "\n</think>\n", "</think>b", " or not")
    ),
    f"r\n\n{BLOCK}</think>\n\n{BLOCK}{EOS}",
    f"r\n\n{BLOCK} or not</think>a\n\n{BLOCK}{EOS}",
    f"r\n\n{BLOCK.replace('DSML｜', 'DSML|')} or not</think>a\n\n{BLOCK}{EOS}",
    f'r\n<tool_calls>\n<invoke name="g">\n</invoke>\n</tool_calls></think>a\n\n{BLOCK}{EOS}',
    f"r\n\n{block(invoke('f', parameter('x', 'a</think>b')))}",
]
TEXTS = [(text, "none") for text in [*OFFICIAL, *LAX, "<think>r\n</think>b", "<think>b", "<thi"]]
TEXTS += [(text, "high") for text in REASONED]
TEXTS += [(f"r</think>{text}", "high") for text in [*OFFICIAL, *LAX[::3]]]


def official_turns():
    for number in range(1, 5):
        prompt = (DATA / f"test_output_{number}.txt").read_text(encoding="utf-8")
        for turn in prompt.split("<｜Assistant｜>")[1:]:
            text = turn.split("<｜User｜>")[0].removeprefix("</think>").removeprefix("<｜action｜>")
            yield text.removeprefix("<think>"), "high" if turn.startswith("<think>") else "none"


@pytest.mark.parametrize("size", [1, 2, 7])
def test_pieces_of_any_size_give_the_message(size):
    for text, thinking in [*TEXTS, *official_turns()]:
        check([text[at : at + size] for at in range(0, len(text), size)], thinking)


def test_every_cut_gives_the_message():
    for text, thinking in [*TEXTS[:8:2], TEXTS[12], TEXTS[-1]]:
        for cut in range(len(text) + 1):
            check(pieces(text, [cut]), thinking)


@given(st.sampled_from(TEXTS), st.data())
def test_any_cuts_give_the_message(chosen, data):
    text, thinking = chosen
    check(pieces(text, data.draw(st.lists(st.integers(0, len(text)), max_size=12))), thinking)


MORE = [*PIECES, *BAD, "`", "\n```\n", "<｜DSML｜tool_calls>\n" + CALL, '<|DSML|invoke name="g">']
MORE += [
    '<｜DSML｜parameter name="x" string="true">',
    '<｜DSML｜invoke name="f">',
    "</｜DSML｜parameter>",
]


@given(st.lists(st.sampled_from(MORE) | st.text(max_size=4), max_size=25), st.integers(1, 9))
@example(["<tool_calls>\n\n", BLOCK], 1)
def test_any_text_gives_its_message(parts, size):
    text = "".join(parts)
    for thinking in ("none", "high"):
        check(parts, thinking)
        check([text[at : at + size] for at in range(0, len(text), size)], thinking)


FEW, MANY = range(150), range(150, 10_000)


@pytest.mark.parametrize(
    "seeds", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
)
def test_generated_completions_give_their_message(seeds):
    for seed in seeds:
        rng = random.Random(seed)
        made = completion(rng)
        for text in (made.text, damage(rng, made).text):
            size = rng.choice([1, 2, 5, 13])
            check([text[at : at + size] for at in range(0, len(text), size)], made.thinking)


def test_official_calls_come_as_they_are_written():
    text = f"r</think>I look.\n\n{BLOCK}"
    _, deltas, last = stream(text, "high")
    assert last == []
    kinds = [type(delta) for delta in deltas]
    assert kinds[0] is Reasoning and kinds[-1] is CallEnd
    assert joined(deltas, CallArguments) == ARGUMENTS
    reading = Completion("high")
    seen = [delta for part in text.partition('string="true">')[:2] for delta in reading.add(part)]
    assert [delta.name for delta in seen if isinstance(delta, CallStart)] == ["f"]
    assert joined(seen, Content) == "I look."
    assert reading.add("long text") == [CallArguments(0, "long text")]
    assert reading.add(' "quoted" a <') == [CallArguments(0, ' \\"quoted\\" a ')]
    assert reading.add(" b </｜DSML") == [CallArguments(0, "< b ")]


def test_prose_is_given_at_once():
    reading = Completion("high")
    assert reading.add("I think") == [Reasoning("I think")]
    assert reading.add(" that <b> is </") == [Reasoning(" that <b> is ")]
    assert reading.add("b>.\n") == [Reasoning("</b>.")]
    assert reading.add("</think>No") == [Reasoning("\n"), Content("No")]
    assert reading.add(" if a < b") == [Content(" if a < b")]


def test_calls_thought_about_do_not_hold_back_the_answer():
    reading = Completion("high")
    assert reading.add(f"Like\n\n{BLOCK}") == [Reasoning("Like")]
    assert reading.add(" or so. ") == [Reasoning(f"\n\n{BLOCK} or so. ")]
    assert reading.add(f"</think>a\n\n{BLOCK}")[0] == Content("a")


@pytest.mark.parametrize("cut", range(BLOCK.index("string="), BLOCK.index("</｜DSML｜invoke")))
def test_a_call_cut_short_is_broken_and_not_repeated_as_text(cut):
    deltas, last = check([f"c\n\n{BLOCK[:cut]}"], "none")
    assert joined([*deltas, *last], Content) == "c" or not calls_of([*deltas, *last])[1]


def test_a_broken_call_is_given_as_text_too():
    open_value = invoke("f", parameter("x", "1")) + '\n<｜DSML｜invoke name="g">'
    open_value += f'\n<｜DSML｜parameter name="x" string="true">1{CALL}'
    deltas, last = check([f"c\n\n{block(open_value)}"], "none")
    assert CallEnd(1, broken=True) in deltas
    assert 'invoke name="g"' in joined(last, Content)


@pytest.mark.parametrize("length", [20_000, pytest.param(300_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("piece", HOSTILE, ids=repr)
def test_a_long_text_is_read_in_time(piece, length):
    """It would take hours if every piece cost a pass over what came before."""
    long = piece * (length // len(piece))
    open_value = "\n\n" + CALL.partition("a<b")[0] + long
    for text in (f"\n\n{block(invoke('f', parameter('x', long)))}", open_value, long):
        thinking = "high" if text == long else "none"
        check([text[at : at + 11] for at in range(0, len(text), 11)], thinking)


def test_ids_cannot_be_guessed_and_replay_renders_the_same_text():
    text = f"c\n\n{BLOCK}"
    reading, deltas, _ = stream([text], "none")
    assert all(re.fullmatch("call_[0-9a-f]{32}", d.id) for d in deltas if isinstance(d, CallStart))
    history = [{"role": "user", "content": "u"}, reading.message]
    assert encode_messages(history, "none").endswith(text + EOS)
    assert reading.sampled == "\n\n" + BLOCK


def test_unknown_thinking_is_refused():
    with pytest.raises(DataError, match="thinking must be one of none, low, high, max"):
        Completion("medium")
