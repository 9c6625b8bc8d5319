"""An answer as OpenAI's Responses tells it: numbered events, and the response that they make."""

import secrets
from dataclasses import dataclass, field
from typing import Any

from ds4mlx.chat.streaming import CallArguments, CallEnd, CallStart, Content, Reasoning
from ds4mlx.engine.request import Ended, Failed, Started, TokenProbs
from ds4mlx.server.answering import Event, KeepAlive, Tokens
from ds4mlx.server.errors import refusal_of
from ds4mlx.server.offered import Offered
from ds4mlx.server.partial_json import InputReader
from ds4mlx.server.schemas_openai import Object
from ds4mlx.server.sealed import seal

# Reasons of the end after which an answer is not complete.
_CUT = {
    "length": "max_output_tokens",
    "context": "max_output_tokens",
    "repetition": "max_output_tokens",
}
_NOTES = {
    "context": "the context is full",
    "repetition": "the answer repeated itself and was ended",
}


@dataclass
class _Item:
    """An item of the output that still grows. At most one is open."""

    kind: str
    id: str
    fields: Object = field(default_factory=dict)
    text: str = ""
    logprobs: list[Object] = field(default_factory=list)
    input: InputReader | None = None


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
    _item: _Item | None = None
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
                return [*self._close(), *self._open_call(call_id, name)]
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
        assert self._item is not None
        place = {"item_id": self._item.id, "output_index": len(self.output)}
        return self._event(f"response.{kind}", **place, **fields)

    def _grow(self, kind: str, text: str) -> list[Object]:
        """More of a thought or of a text."""
        events = []
        if self._item is None or self._item.kind != kind:
            events = [*self._close(), *self._open_text(kind)]
        assert self._item is not None
        self._item.text += text
        name, logprobs = _TEXTS[kind], {}
        if kind == "message":
            logprobs = {"logprobs": [_logprob(token) for token in self._tokens]}
            self._item.logprobs += logprobs["logprobs"]
            self._tokens = []
        delta = self._told(f"{name}.delta", content_index=0, delta=text, **logprobs)
        return [*events, delta]

    def _open_text(self, kind: str) -> list[Object]:
        self._item = _Item(kind, _id("rs" if kind == "reasoning" else "msg"))
        added = self._event(
            "response.output_item.added",
            output_index=len(self.output),
            item=self._seen("in_progress", is_empty=True),
        )
        return [added, self._told("content_part.added", content_index=0, part=self._part())]

    def _open_call(self, call_id: str, name: str) -> list[Object]:
        tool = self.offered.find(name)
        fields = {"call_id": call_id, "name": tool.name}
        if tool.namespace is not None:
            fields["namespace"] = tool.namespace
        kind = "custom_tool_call" if tool.is_custom else "function_call"
        prefix = "ctc" if tool.is_custom else "fc"
        reader = InputReader() if tool.is_custom else None
        self._item = _Item(kind, _id(prefix), fields, input=reader)
        item = self._seen("in_progress")
        return [self._event("response.output_item.added", output_index=len(self.output), item=item)]

    def _grow_call(self, text: str) -> list[Object]:
        assert self._item is not None
        if self._item.input is None:
            self._item.text += text
            return [self._told("function_call_arguments.delta", delta=text)]
        return self._input_delta(self._item.input.add(text))

    def _input_delta(self, text: str) -> list[Object]:
        return [self._told("custom_tool_call_input.delta", delta=text)] if text else []

    def _close(self, status: str = "completed") -> list[Object]:
        """Ends the item that is open."""
        if self._item is None:
            return []
        events = self._done()
        item = self._seen(status)
        done = self._event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)
        self._item = None
        return [*events, done]

    def _done(self) -> list[Object]:
        """What says of the open item's text that it is whole."""
        item = self._item
        assert item is not None
        if item.kind == "function_call":
            name, text = item.fields["name"], item.text
            return [self._told("function_call_arguments.done", name=name, arguments=text)]
        if item.input is not None:
            events = self._input_delta(item.input.finish())
            return [*events, self._told("custom_tool_call_input.done", input=item.input.text)]
        logprobs = {"logprobs": item.logprobs} if item.kind == "message" else {}
        text = self._told(f"{_TEXTS[item.kind]}.done", content_index=0, text=item.text, **logprobs)
        return [text, self._told("content_part.done", content_index=0, part=self._part())]

    def _part(self) -> Object:
        item = self._item
        assert item is not None
        if item.kind == "reasoning":
            return {"type": "reasoning_text", "text": item.text}
        part = {"type": "output_text", "text": item.text, "annotations": []}
        return part | {"logprobs": list(item.logprobs)}

    def _seen(self, status: str, is_empty: bool = False) -> Object:
        """The open item as clients see it."""
        item = self._item
        assert item is not None
        content = [] if is_empty else [self._part()] if item.kind in _TEXTS else None
        seen = {"type": item.kind, "id": item.id, **item.fields, "status": status}
        if item.kind == "reasoning":
            sealed = {"encrypted_content": seal(item.text)} if self.seals else {}
            return seen | {"summary": [], "content": content, **sealed}
        if item.kind == "message":
            return seen | {"role": "assistant", "content": content}
        if item.input is not None:
            return seen | {"input": item.input.text}
        return seen | {"arguments": item.text}

    def _finish(self, ended: Ended) -> list[Object]:
        """The end; an item that is still open was cut, unless all was said."""
        is_cut = ended.reason in _CUT
        status = "incomplete" if is_cut else "completed"
        is_call = self._item is not None and self._item.kind not in _TEXTS
        events = self._close("incomplete" if is_call else status)
        self._end = {"status": status, "usage": self._usage(ended)}
        if is_cut:
            note = {"note": _NOTES[ended.reason]} if ended.reason in _NOTES else {}
            self._end["incomplete_details"] = {"reason": _CUT[ended.reason], **note}
        return [*events, self._event(f"response.{status}", response=self.whole)]

    def _fail(self, error: Exception) -> list[Object]:
        events = self._close("incomplete")
        refusal = refusal_of(error, 500)
        self._end = {"status": "failed"}
        self._end["error"] = {"code": "server_error", "message": refusal.message}
        return [*events, self._event("response.failed", response=self.whole)]

    def _usage(self, ended: Ended) -> Object:
        """OpenAI's account: what was cached is a part of the input."""
        prompt = self._started.prompt_tokens if self._started else 0
        cached = self._started.cached_tokens if self._started else 0
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": prompt - cached,
            },
            "output_tokens": ended.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": ended.reasoning_tokens},
            "total_tokens": prompt + ended.completion_tokens,
        }


_TEXTS = {"reasoning": "reasoning_text", "message": "output_text"}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


def _logprob(token: TokenProbs) -> Object:
    top = [_token(text, value) for text, value in token.top]
    return _token(token.text_bytes, token.logprob) | {"top_logprobs": top}


def _token(text: bytes, logprob: float) -> Object:
    readable = text.decode("utf-8", "replace")
    return {"token": readable, "bytes": list(text), "logprob": logprob}
