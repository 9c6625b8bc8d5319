"""The official prompt of a conversation: as text, byte for byte, and as token ids that are safe.

`encode_messages` is the official encoder: where a text from outside holds a special token, so does
the prompt. `encode_ids` is what a model should be given: there such a text stays text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ds4mlx.chat.history import add_tools, forget_developers, last_user, merge_users, sort_results
from ds4mlx.chat.markup import call_segments
from ds4mlx.chat.messages import Block, Message, Turn, read_tools, read_turns
from ds4mlx.chat.prompts import effort_prefix, response_format_section, tools_section
from ds4mlx.chat.replay import replayed
from ds4mlx.chat.segments import Prompt, Segment, joined, markup, outside
from ds4mlx.chat.tokens import ASSISTANT, BOS, EOS, REMINDER, TASKS, THINK, THINK_END, USER


class SegmentEncoder(Protocol):
    """What `encode_ids` needs of a tokenizer; `ds4mlx.text.tokenizer.Tokenizer` has it."""

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]: ...


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
    """The official prompt text of `messages`.

    Tokenised with special tokens recognised and no further BOS, it is what the official encoder
    gives, also where a text from outside holds a special token, or where a system message or a
    reminder stands last and nothing asks the model to go on. For text from others: `encode_ids`.

    messages: OpenAI-style objects with the roles system, user, assistant, tool, developer and
        latest_reminder; `content` is text, a list of parts, or None. Not changed.
    thinking: none, low, high or max. release ("april" or "0731") decides which effort adds text.
    tools: OpenAI tools, added to those of a leading system or developer message, or announced by
        a new system message. They may also stand in the messages.
    drop_thinking: leave out the reasoning before the last question. With tools all of it stays.
    context: the messages before these, encoded already: they decide, but are not repeated.
    replay: by the ids of tool calls, the exact text they were sampled as (see `sampled_calls`);
        used where it says exactly the calls given.

    Raises DataError, naming the message and the cause.
    """
    prefix = effort_prefix(thinking, release)
    past = merge_users(read_turns(context, "context message"))
    turns = merge_users(read_turns(messages))
    announced = read_tools(tools, "the tools argument")
    past, turns = (add_tools(past, announced), turns) if past else ([], add_tools(turns, announced))
    history = _History.of(past + turns, len(past), thinking, drop_thinking, replay)
    head = "" if past else (BOS if add_bos else "") + (prefix if history.turns else "")
    return head + joined(history.segments())


def encode_ids(
    messages: Sequence[Message],
    tokenizer: "SegmentEncoder",
    thinking: str = "none",
    tools: Sequence[dict[str, Any]] | None = None,
    release: str = "april",
    *,
    drop_thinking: bool = True,
    replay: Mapping[str, str] | None = None,
) -> list[int]:
    """The token ids of a prompt, ending where the model's next words begin.

    The arguments are those of `encode_messages`. The ids are those of its text, but

    - no text from outside (of any message, tool, name or argument) becomes a special token, so
      none can open a turn, a thought or tool markup;
    - the assistant is always asked to go on: behind a system message or a reminder in the last
      place, and in a new turn behind an assistant message, unless that has `wo_eos` or `prefix`
      and is continued;
    - what would be lost or only be named is refused: pictures and the like (those in a tool's
      result are named, as officially), `tools` and `response_format` on a user's message, and a
      key given twice in the arguments of a call.

    Raises DataError, naming the message and the cause.
    """
    return tokenizer.encode_segments(
        encode_segments(
            messages, thinking, tools, release, drop_thinking=drop_thinking, replay=replay
        )
    )


def encode_segments(
    messages: Sequence[Message],
    thinking: str = "none",
    tools: Sequence[dict[str, Any]] | None = None,
    release: str = "april",
    *,
    drop_thinking: bool = True,
    replay: Mapping[str, str] | None = None,
) -> Prompt:
    """The prompt of `encode_ids` before it is tokenised: its own markup, and text from outside."""
    prefix = effort_prefix(thinking, release)
    turns = merge_users(read_turns(messages, strict=True))
    turns = add_tools(turns, read_tools(tools, "the tools argument"))
    history = _History.of(turns, 0, thinking, drop_thinking, replay, hands_over=True)
    return Prompt([markup(BOS + (prefix if turns else "")), *history.segments()])


@dataclass(frozen=True)
class _History:
    """Turns in their final order, of which those from `start` on are rendered.

    question: index of the last one before which thoughts are left out.
    hands_over: whether the assistant is asked to go on behind whatever stands last.
    """

    turns: list[Turn]
    start: int
    thinking: bool
    question: int
    replay: Mapping[str, str] = field(default_factory=dict)
    hands_over: bool = False

    @classmethod
    def of(
        cls,
        turns: list[Turn],
        start: int,
        thinking: str,
        drop_thinking: bool,
        replay: Mapping[str, str] | None,
        hands_over: bool = False,
    ) -> "_History":
        turns, question = sort_results(turns), _SHOW_ALL
        if thinking != "none" and drop_thinking and not any(turn.tools for turn in turns):
            turns, start = forget_developers(turns, start)
            question = last_user(turns)
        return cls(turns, start, thinking != "none", question, replay or {}, hands_over)

    def segments(self) -> list[Segment]:
        """The pieces of the turns, without what stands before the first."""
        asking = self._asking() if self.hands_over else len(self.turns)
        pieces: list[Segment] = []
        for index in range(self.start, len(self.turns)):
            pieces += self._body(index)
            if index < asking and self._is_followed_by_assistant(index):
                pieces.append(markup(self._handover(index)))
        if not self.hands_over or self._is_continued():
            return pieces
        last = self._handover(asking) if asking >= 0 else ""
        return [*pieces, markup(last or ASSISTANT + self._think(True))]

    def _asking(self) -> int:
        """Index of the turn that the model answers; those behind it only tell something."""
        asking = len(self.turns) - 1
        while asking >= 0 and self.turns[asking].role in ("system", "latest_reminder"):
            asking -= 1
        return asking

    def _is_continued(self) -> bool:
        return bool(self.turns) and self.turns[-1].role == "assistant" and self.turns[-1].wo_eos

    def _is_followed_by_assistant(self, index: int) -> bool:
        """Or by a reminder, or by nothing: there the official text asks the model to go on."""
        following = self.turns[index + 1 : index + 2]
        return not following or following[0].role in ("assistant", "latest_reminder")

    def _body(self, index: int) -> list[Segment]:
        turn = self.turns[index]
        if turn.role == "system":
            return _with_sections(turn)
        if turn.role == "developer":
            return [markup(USER), *_with_sections(turn)]
        if turn.role == "user":
            return [markup(USER), *_blocks(turn.blocks)]
        if turn.role == "latest_reminder":
            return [markup(REMINDER), outside(turn.text)]
        pieces = [outside(turn.text), *self._calls(turn), markup("" if turn.wo_eos else EOS)]
        answers_task = index > 0 and self.turns[index - 1].task is not None
        if self.thinking and not answers_task and index > self.question:
            return [outside(turn.reasoning), markup(THINK_END), *pieces]
        return pieces

    def _calls(self, turn: Turn) -> list[Segment]:
        if not turn.calls:
            return []
        sampled = replayed(turn.calls, self.replay) if self.replay else None
        return sampled or [markup("\n\n"), *call_segments(turn.calls)]

    def _handover(self, index: int) -> str:
        """What asks the model to go on, after the last turn or before an answer or reminder."""
        turn = self.turns[index]
        if turn.task == "action":
            return ASSISTANT + self._think(True) + TASKS["action"]
        if turn.task is not None:
            return TASKS[turn.task]
        if turn.role in ("user", "developer"):
            return ASSISTANT + self._think(index >= self.question)
        return ""

    def _think(self, is_latest: bool) -> str:
        return THINK if self.thinking and is_latest else THINK_END


def _with_sections(turn: Turn) -> list[Segment]:
    pieces = [outside(turn.text)]
    if turn.tools:
        pieces += [markup("\n\n"), *tools_section(turn.tools)]
    if turn.response_format:
        pieces += [markup("\n\n"), *response_format_section(turn.response_format)]
    return pieces


def _blocks(blocks: tuple[Block, ...]) -> list[Segment]:
    pieces: list[Segment] = []
    for index, block in enumerate(blocks):
        pieces.append(markup("\n\n" if index else ""))
        if block.call_id is None:
            pieces.append(outside(block.text))
        else:
            pieces += [markup("<tool_result>"), outside(block.text), markup("</tool_result>")]
    return pieces
