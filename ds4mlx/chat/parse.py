"""The message in a model's completion.

Never fails on a model's text: what is malformed is read as well as it can be, and reported.
"""

import json
from typing import Any

from ds4mlx.chat.calls import CallBlock, ends_turn, find_calls
from ds4mlx.chat.markup import Call, Parameter, argument, is_json, new_id, render_calls
from ds4mlx.chat.prompts import check_thinking
from ds4mlx.chat.reading import Reading
from ds4mlx.chat.tokens import CONTROL_TOKEN, DSML, EOS, THINK, THINK_END

CALLS_START, _CALLS_END = f"\n<{DSML}tool_calls>", f"</{DSML}tool_calls>"


def parse_completion(text: str, thinking: str = "none") -> dict[str, Any]:
    """The assistant message that `text`, generated after an encoded prompt, amounts to.

    thinking: none, low, high or max, as given to `encode_messages`; only whether it is none
        matters here.

    Returns role, content and reasoning_content (text), tool_calls (OpenAI's list; `arguments` is
    JSON text; ids are `call_` and 128 random bits, new each time) and malformed: what was wrong
    or mended, one short text each, empty exactly for official output, with or without its EOS.
    Only complete calls become tool_calls; a broken one stays in the content, is named in
    malformed, and costs none of the calls beside it. Calls inside the reasoning stay there,
    unless the turn ends with them. Control tokens are removed from content and reasoning, not
    from arguments.

    Raises DataError for an unknown `thinking`, never for any `text`.
    """
    reasoning, body, malformed = _divided(text, thinking)
    if DSML in reasoning or find_calls(reasoning):
        malformed.append("tool markup inside the reasoning")
    content, calls = _split_calls(body, malformed)
    return {
        "role": "assistant",
        "content": _cleaned(content, "content", malformed),
        "reasoning_content": _cleaned(reasoning, "reasoning", malformed),
        "tool_calls": [_openai(call, malformed) for call in calls],
        "malformed": malformed,
    }


def split_reasoning(text: str, thinking: str) -> tuple[str, str]:
    """Reasoning and the rest, in the order of the text; their delimiters belong to neither.

    Without `</think>` all is reasoning if thinking is on, up to calls that end the turn. If it is
    off, only a text that opens with `<think>` and closes it has reasoning.
    """
    return _divided(text, thinking)[:2]


def _divided(text: str, thinking: str) -> tuple[str, str, list[str]]:
    """Reasoning, the rest, and what is wrong with where they part."""
    check_thinking(thinking)
    turn, _, _ = text.partition(EOS)
    if thinking == "none":
        if not (turn.startswith(THINK) and THINK_END in turn):
            return "", text, []
        reasoning, _, body = text.removeprefix(THINK).partition(THINK_END)
        return reasoning, body, ["reasoning although thinking is off"]
    faults = [f"{THINK} repeated"] if text.startswith(THINK) else []
    text = text.removeprefix(THINK)
    if unclosed := _calls_within(text):
        return *unclosed, [*faults, f"tool calls before {THINK_END}"]
    reasoning = text.partition(EOS)[0].partition(THINK_END)[0]
    rest = text[len(reasoning) :]
    if not rest.startswith(THINK_END):
        faults.append(f"missing {THINK_END}")
    return reasoning, rest.removeprefix(THINK_END), faults


def _calls_within(text: str) -> tuple[str, str] | None:
    """Reasoning, and calls that end the turn although the reasoning before them is not closed.

    Only marked calls in a block, of which nothing is amiss: others the model may think about.
    """
    thought = text.partition(EOS)[0].partition(THINK_END)[0]
    if "DSML" not in thought:
        return None
    block = find_calls(text, len(thought))
    if block is None or not (block.calls and block.is_sound and block.has_closing):
        return None
    rest = text[block.end :].lstrip().removeprefix(THINK_END)
    if not ends_turn(rest, 0) or "DSML" not in text[block.start : block.end]:
        return None
    start = len(text[: block.start].removesuffix("\n").removesuffix("\n"))
    return text[:start], text[start : block.end] + rest.lstrip()


def _split_calls(body: str, malformed: list[str]) -> tuple[str, list[Call]]:
    block = find_calls(body, _turn_end(body))
    if block is None:
        return _until_eos(body, malformed), []
    malformed += [_described(*broken) for broken in block.broken]
    if not block.calls and not block.has_closing:
        malformed.append("incomplete tool call")
        return _until_eos(body, malformed), []
    before = _before_block(body[: block.start], malformed)
    between = [body[slice(*span)].strip() for span in block.between]
    if len(between) > len(block.broken):
        malformed.append("text between the tool calls")
    after = _after_block(body, block, malformed)
    return "\n\n".join(part for part in (before, *between, after) if part), block.calls


def _turn_end(body: str) -> int | None:
    """Where the turn ends; None where it never does, or a block is open that may hold its token."""
    end = body.find(EOS)
    return None if end < 0 or CALLS_START in body[:end] else end


def _described(calls_before: int, broken: Reading) -> str:
    place = f"after {calls_before} calls" if calls_before else "before any other"
    return f"the call of {broken.name:.80} {place} is broken and left as text: {broken.fault}"


def _until_eos(text: str, malformed: list[str]) -> str:
    turn, _, beyond = text.partition(EOS)
    if beyond:
        malformed.append("text after the end of the turn")
    return turn


def _before_block(text: str, malformed: list[str]) -> str:
    if text.endswith("\n\n"):
        return text[:-2]
    malformed.append("no blank line before the tool calls")
    return text.removesuffix("\n")


def _after_block(body: str, block: CallBlock, malformed: list[str]) -> str:
    after = _until_eos(body[block.end :], malformed)
    rest = after.strip()
    markup = body[block.start : block.end]
    if block.has_opening and not block.has_closing:
        if _CALLS_END.startswith(rest):
            malformed.append("tool calls not closed")
            rest = after = ""
        else:
            malformed.append("incomplete tool call")
    official = _canonical(render_calls(tuple(block.calls)))
    whole = block.is_sound and block.has_closing
    if block.slips or (whole and _canonical(markup) != official):
        slips = "; ".join(dict.fromkeys(block.slips))
        malformed.append("tool markup not in the official form" + (slips and f": {slips}"))
    if after and block.has_closing >= block.has_opening:
        malformed.append("text after the tool calls")
    return rest


def _canonical(markup: str) -> str:
    """One spelling for both official ones: a call without parameters may have a blank line."""
    return markup.replace(f'">\n\n</{DSML}invoke>', f'">\n</{DSML}invoke>')


def _cleaned(text: str, part: str, malformed: list[str]) -> str:
    """Encoded again, control tokens would open and close turns that nobody took."""
    malformed += [
        f"{token} inside the {part}" for token in sorted(set(CONTROL_TOKEN.findall(text)))
    ]
    if part == "content" and DSML in text:
        malformed.append("tool markup inside the content")
    return CONTROL_TOKEN.sub("", text)


def _openai(call: Call, malformed: list[str]) -> dict[str, Any]:
    values: dict[str, str] = {}
    for parameter in call.parameters:
        if parameter.key in values:
            malformed.append(f"parameter {parameter.key:.80} given twice")
        values[parameter.key] = _json_value(parameter, malformed)
    pairs = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in values.items())
    function = {"name": call.name, "arguments": "{" + ", ".join(pairs) + "}"}
    return {"id": new_id(), "type": "function", "function": function}


def _json_value(parameter: Parameter, malformed: list[str]) -> str:
    if not (parameter.is_string or is_json(parameter.text)):
        malformed.append(f"parameter {parameter.key:.80} is not JSON")
    return argument(parameter)
