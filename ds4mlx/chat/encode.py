"""The official prompt text of a conversation, complete and byte for byte.

Encode the result with special tokens recognised and no further BOS.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ds4mlx.chat.history import add_tools, forget_developers, last_user, merge_users, sort_results
from ds4mlx.chat.markup import render_calls
from ds4mlx.chat.messages import Block, Message, Turn, read_tools, read_turns
from ds4mlx.chat.prompts import effort_prefix, response_format_section, tools_section
from ds4mlx.chat.tokens import ASSISTANT, BOS, EOS, REMINDER, TASKS, THINK, THINK_END, USER

# Index of the last question where no thought is left out: every turn comes after it.
_SHOW_ALL = -1


def encode_messages(
    messages: Sequence[Message],
    thinking: str = "none",
    tools: Sequence[dict[str, Any]] | None = None,
    release: str = "april",
    *,
    drop_thinking: bool = True,
    add_bos: bool = True,
    context: Sequence[Message] = (),
    replay: Mapping[str, str] | None = None,
) -> str:
    """The prompt text of `messages`, ending where the model's next words begin.

    messages: OpenAI-style objects with the roles system, user, assistant, tool, developer and
        latest_reminder; `content` is text, a list of parts, or None. Not changed.
    thinking: none, low, high or max. release ("april" or "0731") decides which effort adds text.
    tools: OpenAI tools, added to those of a leading system or developer message, or announced by
        a new system message. They may also stand in the messages.
    drop_thinking: leave out the reasoning before the last question. With tools all of it stays.
    context: the messages before these, encoded already: they decide, but are not repeated.
    replay: by the ids of tool calls, the exact text they were sampled as (see `sampled_calls`).

    Raises DataError, naming the message and the cause.
    """
    prefix = effort_prefix(thinking, release)
    past = merge_users(read_turns(context, "context message"))
    turns = merge_users(read_turns(messages))
    announced = read_tools(tools, "the tools argument")
    past, turns = (add_tools(past, announced), turns) if past else ([], add_tools(turns, announced))

    start = len(past)
    turns = sort_results(past + turns)
    question = _SHOW_ALL
    if thinking != "none" and drop_thinking and not any(turn.tools for turn in turns):
        turns, start = forget_developers(turns, start)
        question = last_user(turns)

    head = "" if past else (BOS if add_bos else "") + (prefix if turns else "")
    rendered = (
        _render(turns, index, thinking != "none", question, replay or {})
        for index in range(start, len(turns))
    )
    return head + "".join(rendered)


def _render(
    turns: list[Turn], index: int, thinking: bool, question: int, replay: Mapping[str, str]
) -> str:
    turn, following = turns[index], turns[index + 1 : index + 2]
    answers_task = index > 0 and turns[index - 1].task is not None
    shows_thought = thinking and not answers_task and index > question
    text = _body(turn, shows_thought, replay)
    if following and following[0].role not in ("assistant", "latest_reminder"):
        return text
    return text + _handover(turn, thinking, index >= question)


def _body(turn: Turn, shows_thought: bool, replay: Mapping[str, str]) -> str:
    if turn.role == "system":
        return _with_sections(turn)
    if turn.role == "developer":
        return USER + _with_sections(turn)
    if turn.role == "user":
        return USER + "\n\n".join(_block(block) for block in turn.blocks)
    if turn.role == "latest_reminder":
        return REMINDER + turn.text
    thought = turn.reasoning + THINK_END if shows_thought else ""
    sampled = next((replay[call.id] for call in turn.calls if call.id in replay), None)
    calls = "\n\n" + render_calls(turn.calls) if turn.calls and sampled is None else sampled or ""
    return thought + turn.text + calls + ("" if turn.wo_eos else EOS)


def _with_sections(turn: Turn) -> str:
    text = turn.text
    if turn.tools:
        text += "\n\n" + tools_section(turn.tools)
    if turn.response_format:
        text += "\n\n" + response_format_section(turn.response_format)
    return text


def _block(block: Block) -> str:
    if block.call_id is None:
        return block.text
    return f"<tool_result>{block.text}</tool_result>"


def _handover(turn: Turn, thinking: bool, is_latest: bool) -> str:
    """What asks the model to go on, after the last turn or before an answer or reminder."""
    if turn.task == "action":
        return ASSISTANT + (THINK if thinking else THINK_END) + TASKS["action"]
    if turn.task is not None:
        return TASKS[turn.task]
    if turn.role in ("user", "developer"):
        return ASSISTANT + (THINK if thinking and is_latest else THINK_END)
    return ""
