"""An answer as Anthropic's Messages tells it: ordered events, and the message that they make."""

import json
from dataclasses import dataclass, field

from ds4mlx.chat.streaming import CallArguments, CallEnd, CallStart, Content, Reasoning
from ds4mlx.engine.request import Ended, Failed, Started
from ds4mlx.server.answering import Event, KeepAlive
from ds4mlx.server.errors import ANTHROPIC, refusal_of
from ds4mlx.server.schemas_openai import Object
from ds4mlx.server.sealed import seal
from ds4mlx.server.usage import messages_usage

_REASONS = {
    "stop": "end_turn",
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
    "context": "model_context_window_exceeded",
    "repetition": "max_tokens",
}
_REPEATED = "the answer repeated itself and was ended"


@dataclass
class MessageWriter:
    """One answer. request_id: what an error names. shows_thought: whether the text of a thought is
    told, or only its signature.

    content: the blocks that are whole.
    """

    id: str
    model: str
    request_id: str = ""
    shows_thought: bool = True
    content: list[Object] = field(default_factory=list)
    _index: int = 0
    _block: Object | None = None
    _text: list[str] = field(default_factory=list)
    _started: Started | None = None
    _end: Object = field(default_factory=dict)
    _usage: Object = field(default_factory=dict)

    def add(self, event: Event) -> list[Object]:
        """The events that this one becomes; none for what the protocol does not tell."""
        match event:
            case Started():
                self._started = event
                self._usage = messages_usage(event, None)
                return [{"type": "message_start", "message": self.message}]
            case KeepAlive():
                return [{"type": "ping"}]
            case Reasoning(text):
                return self._grow("thinking", text, self.shows_thought)
            case Content(text):
                return self._grow("text", text)
            case CallStart(_, call_id, name):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return [*self._close(), *self._open(block)]
            case CallArguments(_, text):
                return self._delta(text, {"type": "input_json_delta", "partial_json": text})
            case CallEnd():
                return self._close(is_whole=not event.broken)
            case Ended():
                return self._finish(event)
            case Failed(error):
                return [ANTHROPIC.body(refusal_of(error, 500), self.request_id)]
        return []

    @property
    def message(self) -> Object:
        """The message so far or, after the end, whole."""
        named = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        nothing = {"stop_reason": None, "stop_sequence": None}
        end = nothing | self._end
        return named | {"content": list(self.content), **end, "usage": self._usage}

    def _grow(self, kind: str, text: str, is_shown: bool = True) -> list[Object]:
        events = []
        if self._block is None or self._block["type"] != kind:
            empty = {"signature": ""} if kind == "thinking" else {}
            events = [*self._close(), *self._open({"type": kind, kind: "", **empty})]
        if not is_shown:
            self._text.append(text)
            return events
        return [*events, *self._delta(text, {"type": f"{kind}_delta", kind: text})]

    def _open(self, block: Object) -> list[Object]:
        self._block, self._text = block, []
        start = {"type": "content_block_start", "index": self._index}
        return [start | {"content_block": dict(block)}]

    def _delta(self, text: str, delta: Object) -> list[Object]:
        self._text.append(text)
        return [{"type": "content_block_delta", "index": self._index, "delta": delta}]

    def _close(self, is_whole: bool = True) -> list[Object]:
        """Ends the block that is open; one that is not whole is no part of the message."""
        block, text, events = self._block, "".join(self._text), []
        if block is None:
            return []
        if block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}") if is_whole else {}
        elif block["type"] == "text":
            block["text"] = text
        else:
            block["signature"] = seal("" if self.shows_thought else text)
            block["thinking"] = text if self.shows_thought else ""
            delta = {"type": "signature_delta", "signature": block["signature"]}
            events = self._delta("", delta)
        if is_whole:
            self.content.append(block)
        events.append({"type": "content_block_stop", "index": self._index})
        self._block, self._index = None, self._index + 1
        return events

    def _finish(self, ended: Ended) -> list[Object]:
        """The end. A call that is still open was cut, and is no part of the message."""
        events = self._close(is_whole=self._block is None or self._block["type"] != "tool_use")
        reason = _REASONS[ended.reason]
        if ended.reason == "stop" and any(b["type"] == "tool_use" for b in self.content):
            reason = "tool_use"
        is_stop = ended.reason == "stop_sequence"
        self._end = {"stop_reason": reason, "stop_sequence": ended.stop if is_stop else None}
        if ended.reason == "repetition":
            self._end["stop_note"] = _REPEATED
        self._usage = messages_usage(self._started, ended)
        delta = {"type": "message_delta", "delta": dict(self._end), "usage": self._usage}
        return [*events, delta, {"type": "message_stop"}]
