"""An answer as OpenAI's Responses tells it: numbered events, and the response that they make."""

from dataclasses import dataclass, field
from typing import Any

from ds4mlx.chat.streaming import CallArguments, CallEnd, CallStart, Content, Reasoning
from ds4mlx.engine.request import Ended, Failed, Started, TokenProbs
from ds4mlx.server.answering import Event, KeepAlive, Tokens
from ds4mlx.server.errors import refusal_of
from ds4mlx.server.logprobs import chat_logprobs
from ds4mlx.server.offered import Offered
from ds4mlx.server.response_items import TEXTS, Item, call_item
from ds4mlx.server.schemas_openai import Object
from ds4mlx.server.usage import responses_usage

# Reasons of the end after which an answer is not complete, and what there is to say of them.
_CUT = {
    "length": "",
    "context": "the context is full",
    "repetition": "the answer repeated itself and was ended",
}
_NONE: Object = {"content": []}


@dataclass
class ResponseWriter:
    """One answer.

    response: what the whole response says beside its output and its end. seals: whether thoughts
    also come in the form that `unseal` reads. tells_logprobs: whether they were asked for.
    output: the items that are whole.
    """

    response: Object
    offered: Offered
    seals: bool = False
    tells_logprobs: bool = False
    output: list[Object] = field(default_factory=list)
    _number: int = 0
    _item: Item | None = None
    _tokens: list[TokenProbs] = field(default_factory=list)
    _started: Started | None = None
    _end: Object = field(default_factory=dict)

    def begin(self) -> list[Object]:
        """What a stream begins with, before anything is known of the answer."""
        snapshots = ("response.created", "response.in_progress")
        return [self._event(kind, response=self.whole) for kind in snapshots]

    def add(self, event: Event) -> list[Object]:
        """The events that this one becomes; none for what the protocol does not tell."""
        match event:
            case Started():
                self._started = event
            case KeepAlive():
                return [self._event("response.in_progress", response=self.whole)]
            case Tokens(tokens, thinking) if not thinking and self.tells_logprobs:
                self._tokens += tokens
            case Reasoning(text):
                return self._grow("reasoning", text)
            case Content(text):
                return self._grow("message", text)
            case CallStart(_, call_id, name):
                return [*self._close(), *self._open(call_item(self.offered.find(name), call_id))]
            case CallArguments(_, text):
                return self._grow_call(text)
            case CallEnd():
                return self._close("incomplete" if event.broken else "completed")
            case Ended():
                return self._finish(event)
            case Failed(error):
                return self._fail(error)
        return []

    @property
    def whole(self) -> Object:
        """The response so far or, after the end, whole."""
        start = {"status": "in_progress", "error": None, "incomplete_details": None, "usage": None}
        return self.response | start | self._end | {"output": list(self.output)}

    def _event(self, kind: str, **fields: Any) -> Object:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _told(self, kind: str, **fields: Any) -> Object:
        """An event of the item that is open."""
        place = {"item_id": self._open_item.id, "output_index": len(self.output)}
        return self._event(f"response.{kind}", **place, **fields)

    def _grow(self, kind: str, text: str) -> list[Object]:
        """More of a thought or of a text."""
        events: list[Object] = []
        if self._item is None or self._item.kind != kind:
            events = [*self._close(), *self._open(Item(kind), is_empty=True)]
            events.append(
                self._told("content_part.added", content_index=0, part=self._open_item.part)
            )
        item, logprobs = self._open_item, {}
        if kind == "message":
            logprobs = {"logprobs": (chat_logprobs(self._tokens) or _NONE)["content"]}
            item.logprobs, self._tokens = item.logprobs + logprobs["logprobs"], []
        item.text += text
        delta = self._told(f"{TEXTS[kind]}.delta", content_index=0, delta=text, **logprobs)
        return [*events, delta]

    def _grow_call(self, text: str) -> list[Object]:
        item = self._open_item
        if item.input is not None:
            return self._input_delta(item.input.add(text))
        item.text += text
        return [self._told("function_call_arguments.delta", delta=text)]

    def _input_delta(self, text: str) -> list[Object]:
        return [self._told("custom_tool_call_input.delta", delta=text)] if text else []

    @property
    def _open_item(self) -> Item:
        assert self._item is not None
        return self._item

    def _open(self, item: Item, is_empty: bool = False) -> list[Object]:
        self._item = item
        seen = item.seen("in_progress", is_empty=is_empty)
        return [self._event("response.output_item.added", output_index=len(self.output), item=seen)]

    def _close(self, status: str = "completed") -> list[Object]:
        """Ends the item that is open."""
        if self._item is None:
            return []
        events, index = self._done(self._item), len(self.output)
        item = self._item.seen(status, self.seals)
        done = self._event("response.output_item.done", output_index=index, item=item)
        self.output.append(item)
        self._item = None
        return [*events, done]

    def _done(self, item: Item) -> list[Object]:
        """What says of the open item's text that it is whole."""
        if item.input is not None:
            events = self._input_delta(item.input.finish())
            return [*events, self._told("custom_tool_call_input.done", input=item.input.text)]
        if item.is_call:
            name, text = item.fields["name"], item.text
            return [self._told("function_call_arguments.done", name=name, arguments=text)]
        logprobs = {"logprobs": item.logprobs} if item.kind == "message" else {}
        name = f"{TEXTS[item.kind]}.done"
        text = self._told(name, content_index=0, text=item.text, **logprobs)
        return [text, self._told("content_part.done", content_index=0, part=item.part)]

    def _finish(self, ended: Ended) -> list[Object]:
        """The end; a call that is still open was cut, whatever has ended it."""
        is_cut = ended.reason in _CUT
        status = "incomplete" if is_cut else "completed"
        was_cut = is_cut or (self._item is not None and self._item.is_call)
        events = self._close("incomplete" if was_cut else "completed")
        self._end = {"status": status, "usage": responses_usage(self._started, ended)}
        if is_cut:
            note = {"note": _CUT[ended.reason]} if _CUT[ended.reason] else {}
            self._end["incomplete_details"] = {"reason": "max_output_tokens", **note}
        return [*events, self._event(f"response.{status}", response=self.whole)]

    def _fail(self, error: Exception) -> list[Object]:
        events = self._close("incomplete")
        message = refusal_of(error, 500).message
        self._end = {"status": "failed", "error": {"code": "server_error", "message": message}}
        return [*events, self._event("response.failed", response=self.whole)]
