"""Calls as chat's clients know them, whole and in pieces: of functions, and of custom tools.

A custom tool is called with a text, of which the model writes JSON.
"""

from typing import Any

from ds4mlx.chat.streaming import CallArguments, CallEnd, CallStart
from ds4mlx.server.offered import Offered
from ds4mlx.server.partial_json import InputReader
from ds4mlx.server.schemas_openai import Object


def whole_call(call: Object, offered: Offered) -> Object:
    """A call of a message, as `parse_completion` gives it."""
    tool = offered.find(call["function"]["name"])
    if not tool.is_custom:
        return call
    reader = InputReader()
    reader.add(call["function"]["arguments"])
    reader.finish()
    custom = {"name": tool.name, "input": reader.text}
    return {"id": call["id"], "type": "custom", "custom": custom}


class CallPieces:
    """Makes of the deltas of calls those of a stream."""

    def __init__(self, offered: Offered):
        self._offered = offered
        self._input: InputReader | None = None  # of the call that goes on, if its tool is custom

    def add(self, delta: Any) -> Object | None:
        """What a chunk says of one; None for nothing, or where it is none of a call."""
        match delta:
            case CallStart():
                return self._begun(delta)
            case CallArguments(index, text):
                return self._more(index, text)
            case CallEnd(index) if self._input is not None:
                return _input(index, self._input.finish())
        return None

    def _begun(self, start: CallStart) -> Object:
        tool = self._offered.find(start.name)
        self._input = InputReader() if tool.is_custom else None
        kind, key = ("custom", "input") if tool.is_custom else ("function", "arguments")
        return {
            "index": start.index,
            "id": start.id,
            "type": kind,
            kind: {"name": tool.name, key: ""},
        }

    def _more(self, index: int, text: str) -> Object | None:
        if self._input is None:
            return {"index": index, "function": {"arguments": text}}
        return _input(index, self._input.add(text))


def _input(index: int, text: str) -> Object | None:
    return {"index": index, "custom": {"input": text}} if text else None
