"""The message in a completion while it is generated: what is certain of it, piece by piece."""

from collections.abc import Callable, Iterator
from typing import Any

from ds4mlx.chat import spelling
from ds4mlx.chat.call_stream import CallReader
from ds4mlx.chat.deltas import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Delta,
    Reasoning,
    merged,
)
from ds4mlx.chat.doubt import Doubt
from ds4mlx.chat.growing import Prose
from ds4mlx.chat.parse import parse_completion
from ds4mlx.chat.prompts import check_thinking
from ds4mlx.chat.replay import sampled_calls
from ds4mlx.chat.tokens import CONTROL_TOKEN, EOS, THINK, THINK_END


class Completion:
    """Reads a completion as it comes, in pieces cut anywhere.

    The deltas joined are the message that `parse_completion` reads in the whole text, however it
    is cut: reasoning, content, and the calls' names and arguments. Official calls come as they
    are written; what is not certain before the text's end, such as calls in other spellings and
    text behind calls, comes with it. A call that was begun and turns out to be broken ends with
    `CallEnd(broken=True)`; the message has it as text, which is given as content too unless it
    is the text's end that broke the call.

    thinking: none, low, high or max, as given to `encode_messages`. After `finish`, `message` is
    `parse_completion`'s, with the ids that were streamed, and `sampled` the text of the calls
    for `replay` of `encode_messages`, "" if there is none. Raises DataError for an unknown
    `thinking`, never for any text.
    """

    def __init__(self, thinking: str):
        check_thinking(thinking)
        self.message: dict[str, Any] = {}
        self.sampled = ""
        self._thinking = thinking
        self._pieces: list[str] = []
        self._start = ""
        self._prose = Prose(())
        self._doubt: Doubt | None = None
        self._calls: CallReader | None = None
        self._sent = {Reasoning: 0, Content: 0}
        self._read: Callable[[str], Iterator[Delta]] = self._read_start

    def add(self, text: str) -> list[Delta]:
        """Take more text; returns what has become certain."""
        self._pieces.append(text)
        return self._counted(self._read(text))

    def finish(self) -> list[Delta]:
        """The text is complete; returns what was held back."""
        text = "".join(self._pieces)
        self.message = parse_completion(text, self._thinking)
        self.sampled = sampled_calls(text, self._thinking)
        return self._counted(self._rest())

    @property
    def given(self) -> str:
        """What the deltas gave of the message's content; known after `finish`."""
        return self.message["content"][: self._sent[Content]]

    def _counted(self, deltas: Iterator[Delta]) -> list[Delta]:
        found = merged(deltas)
        for delta in found:
            if isinstance(delta, (Reasoning, Content)):
                self._sent[type(delta)] += len(delta.text)
        return found

    def _read_start(self, text: str) -> Iterator[Delta]:
        """A repeated `<think>` opens the reasoning; with thinking off only if it is closed, too."""
        self._start += text
        if len(self._start) < len(THINK) and THINK.startswith(self._start):
            return
        if self._thinking != "none":
            self._begin(self._read_reasoning, (EOS, THINK_END))
            yield from self._read(self._start.removeprefix(THINK))
        elif not self._start.startswith(THINK):
            self._begin(self._read_answer, (EOS,))
            yield from self._read(self._start)
        elif THINK_END in self._start:
            reasoning, _, answer = self._start.removeprefix(THINK).partition(THINK_END)
            self._begin(self._read_answer, (EOS,))
            if EOS in reasoning:
                self._read = self._hold
            else:
                yield Reasoning(CONTROL_TOKEN.sub("", reasoning))
            yield from self._read(answer)

    def _begin(self, read: Callable[[str], Iterator[Delta]], ends: tuple[str, ...]) -> None:
        self._prose, self._read = Prose(ends), read

    def _read_reasoning(self, text: str) -> Iterator[Delta]:
        prose = self._prose
        yield Reasoning(prose.add(text))
        if prose.ended == THINK_END:
            self._begin(self._read_answer, (EOS,))
            yield from self._read(prose.rest)
        elif prose.opening is not None:
            self._doubt = self._doubt or Doubt(prose.opening, prose.level)
            if self._doubt.is_over(prose.text):
                prose.talk()
                yield from self._read_reasoning("")

    def _read_answer(self, text: str) -> Iterator[Delta]:
        prose = self._prose
        yield Content(prose.add(text))
        if prose.opening is not None and prose.level == spelling.OFFICIAL:
            self._calls, self._read = CallReader(prose.text, prose.opening), self._read_calls
            yield from self._read("")

    def _read_calls(self, text: str) -> Iterator[Delta]:
        assert self._calls is not None
        yield from self._calls.add(text)

    def _hold(self, text: str) -> Iterator[Delta]:
        yield from ()

    def _rest(self) -> Iterator[Delta]:
        """What the message has beyond what was given."""
        yield Reasoning(self.message["reasoning_content"][self._sent[Reasoning] :])
        given = self._calls.ids if self._calls else []
        calls = self.message["tool_calls"][len(given) :]
        for call, call_id in zip(self.message["tool_calls"], given, strict=False):
            call["id"] = call_id
        index, is_cut = len(given), False
        if self._calls is not None and self._calls.open is not None:
            is_mended = bool(calls) and self._take_up(self._calls.open, calls[0])
            yield from self._close(self._calls.open, calls.pop(0) if is_mended else None)
            is_cut = not is_mended and self._calls.is_cut
        if self._calls is not None and (self._calls.open or self._calls.broken):
            index += 1
        if not is_cut:
            yield Content(self.message["content"][self._sent[Content] :])
        for number, call in enumerate(calls, index):
            yield from _whole(number, call)

    def _take_up(self, begun: CallStart, call: dict[str, Any]) -> bool:
        """Whether `call` is the one that was begun; it gets its id then."""
        assert self._calls is not None
        function = call["function"]
        is_same = function["name"] == begun.name
        is_same = is_same and function["arguments"].startswith(self._calls.given)
        if is_same:
            call["id"] = begun.id
        return is_same

    def _close(self, begun: CallStart, call: dict[str, Any] | None) -> Iterator[Delta]:
        assert self._calls is not None
        if call is not None:
            rest = call["function"]["arguments"][len(self._calls.given) :]
            yield CallArguments(begun.index, rest)
        yield CallEnd(begun.index, broken=call is None)


def _whole(index: int, call: dict[str, Any]) -> Iterator[Delta]:
    yield CallStart(index, call["id"], call["function"]["name"])
    yield CallArguments(index, call["function"]["arguments"])
    yield CallEnd(index)
