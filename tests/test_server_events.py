"""What an answer becomes in Messages and Responses, by the SDKs' own types, without a server."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_formats import message_of, response_of

from ds4mlx.chat.streaming import CallArguments, CallEnd, CallStart, Completion, Content, Reasoning
from ds4mlx.engine.answers import Answer
from ds4mlx.engine.request import Ended, Failed, Piece, Started, Stopping, TokenProbs
from ds4mlx.server.answering import KeepAlive, Tokens, Turn
from ds4mlx.server.chat_calls import CallPieces, whole_call
from ds4mlx.server.messages_events import MessageWriter
from ds4mlx.server.offered import Offered, Tool
from ds4mlx.server.partial_json import InputReader
from ds4mlx.server.response_object import response_of as request_of
from ds4mlx.server.responses_events import ResponseWriter
from ds4mlx.server.schemas_responses import ResponsesRequest
from ds4mlx.server.sealed import seal, unseal

START = Started(100, 60, "memory")
THOUGHT = [Reasoning("I "), Reasoning("see")]
TEXT = [Content("a"), KeepAlive(), Content("b\u2028")]
CALL = [CallStart(0, "call_1", "f"), CallArguments(0, '{"x"'), CallArguments(0, ": 1}"), CallEnd(0)]
EMPTY = [CallStart(1, "call_2", "deep__g"), CallArguments(1, "{}"), CallEnd(1)]
CUT = [CallStart(0, "call_1", "f"), CallArguments(0, '{"x"'), CallEnd(0, broken=True)]
PATCH = [
    CallStart(0, "call_3", "patch"),
    CallArguments(0, '{"input": "a\\'),
    CallArguments(0, 'n"}'),
]
PATCH += [CallEnd(0)]
ANSWERS = {
    "nothing": [],
    "text": TEXT,
    "thought": THOUGHT,
    "all": [*THOUGHT, *TEXT, *CALL, *EMPTY],
    "calls": [*CALL, *EMPTY],
    "cut call": [*TEXT, *CUT],
    "text behind a call": [*CALL, *TEXT],
    "custom": PATCH,
}


def ended(reason="stop", stop=None):
    return Ended(reason, stop, 9, 4, 1.0, 1.0)


def offered():
    tools = Offered()
    tools.add(Tool("f"), None, {})
    tools.add(Tool("g", "deep"), None, {})
    tools.add(Tool("patch", None, True), None, {})
    return tools


def messages(answer, end=None, **options):
    writer = MessageWriter("msg_1", "small", **options)
    events = [made for each in [START, *answer, end or ended()] for made in writer.add(each)]
    return json.loads(json.dumps(events)), writer.message


def responses(answer, end=None, body=None, **options):
    request = ResponsesRequest.model_validate(body or {"input": "?"})
    writer = ResponseWriter(request_of("resp_1", request, "small"), offered(), **options)
    events = writer.begin()
    events += [made for each in [START, *answer, end or ended()] for made in writer.add(each)]
    return json.loads(json.dumps(events)), writer.whole


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_events_are_what_the_sdks_know_in_order_and_make_the_whole(answer):
    events, whole = messages(answer)
    assert message_of(events) == whole
    events, whole = responses(answer)
    assert response_of(events) == whole


def test_what_messages_tells_of_everything():
    message = message_of(messages(ANSWERS["all"])[0])
    thought, text, first, second = message["content"]
    assert (thought["thinking"], text["text"]) == ("I see", "ab\u2028")
    assert first == {"type": "tool_use", "id": "call_1", "name": "f", "input": {"x": 1}}
    assert second["input"] == {} and message["stop_reason"] == "tool_use"
    usage = message["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (40, 60)
    assert usage["output_tokens"] == 9
    assert {"type": "ping"} in messages(TEXT)[0]


@pytest.mark.parametrize(
    ("reason", "stop", "said"),
    [
        ("stop", None, "end_turn"),
        ("stop_sequence", "END", "stop_sequence"),
        ("length", None, "max_tokens"),
        ("context", None, "model_context_window_exceeded"),
        ("repetition", None, "max_tokens"),
    ],
)
def test_why_an_answer_ended(reason, stop, said):
    message = message_of(messages(TEXT, ended(reason, stop))[0])
    assert (message["stop_reason"], message["stop_sequence"]) == (said, stop)
    assert ("stop_note" in message) == (reason == "repetition")
    response = response_of(responses(TEXT, ended(reason, stop))[0])
    is_cut = reason in ("length", "context", "repetition")
    assert response["status"] == ("incomplete" if is_cut else "completed")
    if is_cut:
        assert response["incomplete_details"]["reason"] == "max_output_tokens"
        assert ("note" in response["incomplete_details"]) == (reason != "length")


def test_a_call_that_was_cut_is_no_part_of_a_message():
    events, whole = messages([*TEXT, *CUT[:2]], ended("length"))
    assert [block["type"] for block in whole["content"]] == ["text"]
    assert message_of(events) == whole and whole["stop_reason"] == "max_tokens"
    response = response_of(responses([*CUT[:2]], ended("length"))[0])
    (call,) = response["output"]
    assert (call["status"], call["arguments"]) == ("incomplete", '{"x"')


def test_a_thought_that_is_not_shown_comes_back_by_its_signature():
    message = message_of(messages(THOUGHT, shows_thought=False)[0])
    (block,) = message["content"]
    assert (block["thinking"], unseal(block["signature"])) == ("", "I see")


def test_what_responses_tells_of_everything():
    response = response_of(responses(ANSWERS["all"], seals=True)[0])
    thought, text, first, second = response["output"]
    assert unseal(thought["encrypted_content"]) == thought["content"][0]["text"] == "I see"
    assert text["content"][0]["text"] == "ab\u2028"
    assert (first["name"], first["arguments"]) == ("f", '{"x": 1}')
    assert (second["namespace"], second["name"], second["call_id"]) == ("deep", "g", "call_2")
    usage = response["usage"]
    assert usage["input_tokens"] == 100 and usage["input_tokens_details"]["cached_tokens"] == 60
    assert usage["total_tokens"] == 109 and usage["output_tokens_details"]["reasoning_tokens"] == 4


def test_a_custom_tool_is_called_with_its_text():
    events, _ = responses(PATCH)
    (call,) = response_of(events)["output"]
    assert (call["type"], call["input"], call["name"]) == ("custom_tool_call", "a\n", "patch")
    deltas = [e["delta"] for e in events if e["type"].endswith("input.delta")]
    assert deltas == ["a", "\n"]
    pieces = CallPieces(offered())
    begun, *more = [piece for delta in PATCH if (piece := pieces.add(delta)) is not None]
    custom = {"name": "patch", "input": ""}
    assert begun == {"index": 0, "id": "call_3", "type": "custom", "custom": custom}
    assert more == [{"index": 0, "custom": {"input": text}} for text in ("a", "\n")]


def test_logprobs_stand_by_the_text_they_belong_to():
    token = TokenProbs(7, b"a", -0.5, ((b"a", -0.5), (b"\xc3", -2.0)))
    answer = [Tokens((token,), True), *THOUGHT, Tokens((token,), False), Content("a")]
    response = response_of(responses(answer, tells_logprobs=True)[0])
    (entry,) = response["output"][1]["content"][0]["logprobs"]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("a", [97], -0.5)
    assert [top["bytes"] for top in entry["top_logprobs"]] == [[97], [195]]


def test_a_failure_is_told_in_the_protocol_s_own_way():
    events, _ = messages(TEXT, Failed(Stopping()), request_id="req_1")
    error = events[-1]
    assert error["type"] == "error" and error["error"]["type"] == "overloaded_error"
    assert error["request_id"] == "req_1" and "stopping" in error["error"]["message"]
    response = response_of(responses([*THOUGHT, *TEXT[:1]], Failed(Stopping()))[0])
    assert response["status"] == "failed" and "stopping" in response["error"]["message"]
    assert response["output"][-1]["status"] == "incomplete"


def test_a_sign_of_life_has_the_next_number():
    events, _ = responses([KeepAlive(), KeepAlive(), *TEXT])
    assert [e["type"] for e in events[:4]] == ["response.created"] + 3 * ["response.in_progress"]
    assert response_of(events)["status"] == "completed"


def test_the_request_is_told_again():
    tools = [{"type": "function", "name": "f"}, {"type": "web_search"}]
    asked = {"instructions": "Be.", "metadata": {"a": "b"}, "reasoning": {"effort": "low"}}
    body = {"input": "?", "model": "any", "tools": tools, **asked, "top_p": 0.5}
    response = response_of(responses(TEXT, body=body)[0])
    assert response["model"] == "any" and response["top_p"] == 0.5
    assert {key: response[key] for key in asked} == asked
    assert response["tools"] == [tools[0] | {"parameters": None, "strict": None}, tools[1]]


@given(st.text(), st.booleans(), st.lists(st.integers(0, 400), max_size=12))
def test_the_text_of_a_custom_call_is_read_from_any_fragments(text, escapes, cuts):
    raw = json.dumps({"input": text}, ensure_ascii=escapes)
    cuts = sorted({min(cut, len(raw)) for cut in cuts})
    reader = InputReader()
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    told = "".join(reader.add(piece) for piece in pieces) + reader.finish()
    assert told == reader.text == text


@pytest.mark.parametrize("raw", ['{"inputs": "x"}', "{}", '{"input": 3}', '["input"]'])
def test_a_custom_call_without_its_text_is_told_as_json(raw):
    reader = InputReader()
    assert reader.add(raw) == "" and reader.finish() == reader.text == raw
    told = [CallStart(0, "call_3", "patch"), CallArguments(0, raw), CallEnd(0)]
    pieces = CallPieces(offered())
    assert [pieces.add(delta) for delta in told][1:] == [
        None,
        {"index": 0, "custom": {"input": raw}},
    ]
    call = {"id": "call_3", "function": {"name": "patch", "arguments": raw}}
    assert whole_call(call, offered())["custom"] == {"name": "patch", "input": raw}


@given(st.text())
def test_sealed_thoughts_come_back(text):
    assert unseal(seal(text)) == text


@pytest.mark.parametrize(
    "foreign", [None, 3, "", "EqRkLm==", seal("x")[:-3], seal("x") + "é", seal("é")[:-4] + "w6=="]
)
def test_what_was_sealed_elsewhere_says_nothing(foreign):
    assert unseal(foreign) == ""


CALLS = """See.

<｜DSML｜tool_calls>
<｜DSML｜invoke name="f">
<｜DSML｜parameter name="x" string="true">1</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="g">
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""


@pytest.mark.parametrize("before", ["See.", "", "See.\n\n", "If a <", "A <｜DSML｜ opens"])
def test_an_answer_that_is_cut_anywhere_in_its_calls_shows_no_markup(before):
    """Behind the first call too, where a further one or the end of them all was begun."""
    text = before + CALLS.removeprefix("See.")

    async def remember(ids, sampled):
        assert sampled in text

    async def read(length):
        answer = Answer(lambda: None)
        for event in [START, Piece(text[:length], False), ended("length")]:
            answer.arrived(event)
        turn = Turn("an id", answer, Completion("none"), remember)
        told = [event.text async for event in turn if isinstance(event, Content)]
        return "".join(told), turn.message["content"], len(turn.message["tool_calls"])

    ends = [asyncio.run(read(length)) for length in range(len(before), len(text) + 1)]
    assert all(told == content == before for told, content, _ in ends[3:])
    assert {calls for *_, calls in ends} == {0, 1, 2}


@pytest.mark.parametrize("thinking", ["none", "high"])
def test_a_text_up_to_a_stop_text_is_told_as_it_is(thinking):
    """Its end is no markup that was begun, be it as short as this."""
    before = "" if thinking == "none" else "I think.</think>"

    async def unused(ids, sampled):
        raise AssertionError("there is no call")

    async def read():
        answer = Answer(lambda: None)
        for event in [START, Piece(before + "a\n\n<", False), ended("stop_sequence")]:
            answer.arrived(event)
        turn = Turn("an id", answer, Completion(thinking), unused)
        return [event.text async for event in turn if isinstance(event, Content)], turn.message

    told, message = asyncio.run(read())
    assert "".join(told) == message["content"] == "a\n\n<"


def test_signs_of_life_come_where_text_is_held_back():
    """A list in a call is told when all of it is there."""
    opening = ["\n\n<｜DSML｜tool_calls>\n", '<｜DSML｜invoke name="f">\n']
    values = ['<｜DSML｜parameter name="x" string="false">[', *["1, "] * 5]

    async def read():
        answer, seen = Answer(lambda: None), []
        pieces = [Piece(text, False) for text in opening + values]
        for event in [START, *pieces, ended("length")]:
            answer.arrived(event)
        turn = Turn("an id", answer, Completion("none"), asyncio.sleep)
        async for event in turn:
            seen.append(event)
            turn.told_at -= 1000  # as if nothing had been told for so long
        return seen

    seen = asyncio.run(read())
    begun = next(at for at, event in enumerate(seen) if isinstance(event, CallStart))
    assert seen[begun + 1 :].count(KeepAlive()) == len(values)
