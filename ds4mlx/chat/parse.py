"""The message in a model's completion.

Never fails on a model's text: what is malformed is read as well as it can be, and reported.
"""

import json
import re
from typing import Any

from ds4mlx.chat.calls import CallBlock, find_calls
from ds4mlx.chat.markup import Call, Parameter, render_calls
from ds4mlx.chat.prompts import check_thinking
from ds4mlx.chat.tokens import CONTROL, DSML, EOS, THINK, THINK_END

_CONTROL = re.compile("|".join(re.escape(token) for token in CONTROL))
_CALLS_END = f"</{DSML}tool_calls>"


def parse_completion(text: str, thinking: str = "none") -> dict[str, Any]:
    """The assistant message that `text`, generated after an encoded prompt, amounts to.

    thinking: none, low, high or max, as given to `encode_messages`; only whether it is none
        matters here.

    Returns role, content and reasoning_content (text), tool_calls (OpenAI's list; `arguments` is
    JSON text, ids are call_0, call_1, ...) and malformed: what was wrong, one short text each,
    empty for official output with or without its EOS. Only complete calls, outside the
    reasoning, become tool_calls; other tool markup stays in the text. Control tokens are removed
    from content and reasoning, not from arguments.

    Raises DataError for an unknown `thinking`, never for any `text`.
    """
    reasoning, body = split_reasoning(text, thinking)
    malformed = _reasoning_faults(text, reasoning, body, thinking)
    content, calls = _split_calls(body, malformed)
    return {
        "role": "assistant",
        "content": _cleaned(content, "content", malformed),
        "reasoning_content": _cleaned(reasoning, "reasoning", malformed),
        "tool_calls": [_openai(call, index, malformed) for index, call in enumerate(calls)],
        "malformed": malformed,
    }


def split_reasoning(text: str, thinking: str) -> tuple[str, str]:
    """Reasoning and the rest, in the order of the text; their delimiters belong to neither.

    Without `</think>` all is reasoning if thinking is on. If it is off, only a text that opens
    with `<think>` and closes it has reasoning.
    """
    check_thinking(thinking)
    turn, _, _ = text.partition(EOS)
    opened = turn.startswith(THINK)
    if thinking == "none" and not (opened and THINK_END in turn):
        return "", text
    reasoning = turn.partition(THINK_END)[0]
    body = text[len(reasoning) :].removeprefix(THINK_END)
    return reasoning.removeprefix(THINK), body


def _reasoning_faults(text: str, reasoning: str, body: str, thinking: str) -> list[str]:
    faults = []
    if thinking == "none":
        faults += ["reasoning although thinking is off"] if body != text else []
    else:
        faults += [f"{THINK} repeated"] if text.startswith(THINK) else []
        faults += [f"missing {THINK_END}"] if THINK_END not in text.partition(EOS)[0] else []
    if DSML in reasoning or find_calls(reasoning):
        faults.append("tool markup inside the reasoning")
    return faults


def _split_calls(body: str, malformed: list[str]) -> tuple[str, tuple[Call, ...]]:
    block = find_calls(body)
    end_of_turn = body.find(EOS)
    if block is None or -1 < end_of_turn < block.start:
        return _until_eos(body, malformed), ()
    if not block.calls and not block.closed:
        malformed.append("incomplete tool call")
        return _until_eos(body, malformed), ()
    before = _before_block(body[: block.start], malformed)
    after = _after_block(body, block, malformed)
    return "\n\n".join(part for part in (before, after) if part), block.calls


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
    if not block.closed:
        was_cut = _CALLS_END.startswith(rest)
        malformed.append("tool calls not closed" if was_cut else "incomplete tool call")
        return "" if was_cut else rest
    if _canonical(body[block.start : block.end]) != _canonical(render_calls(block.calls)):
        malformed.append("tool markup not in the official form")
    if after:
        malformed.append("text after the tool calls")
    return rest


def _canonical(markup: str) -> str:
    """One spelling for both official ones: a call without parameters may have a blank line."""
    return markup.replace(f'">\n\n</{DSML}invoke>', f'">\n</{DSML}invoke>')


def _cleaned(text: str, part: str, malformed: list[str]) -> str:
    """Encoded again, control tokens would open and close turns that nobody took."""
    malformed += [f"{token} inside the {part}" for token in sorted(set(_CONTROL.findall(text)))]
    if part == "content" and DSML in text:
        malformed.append("tool markup inside the content")
    return _CONTROL.sub("", text)


def _openai(call: Call, index: int, malformed: list[str]) -> dict[str, Any]:
    values: dict[str, str] = {}
    for parameter in call.parameters:
        if parameter.key in values:
            malformed.append(f"parameter {parameter.key:.80} given twice")
        values[parameter.key] = _json_value(parameter, malformed)
    pairs = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in values.items())
    function = {"name": call.name, "arguments": "{" + ", ".join(pairs) + "}"}
    return {"id": f"call_{index}", "type": "function", "function": function}


def _json_value(parameter: Parameter, malformed: list[str]) -> str:
    if not parameter.is_string:
        if _is_json(parameter.text):
            return parameter.text
        malformed.append(f"parameter {parameter.key:.80} is not JSON")
    return json.dumps(parameter.text, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    """Python reads NaN and Infinity, which are not JSON."""
    raise ValueError(name)
