"""What a completion is streamed as: pieces of reasoning, of the answer and of tool calls."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Reasoning:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins; `index` counts the calls of the completion from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments; all of them joined are the text of one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A call is over; `broken`: it never was completed, and is none of the message's calls."""

    index: int
    broken: bool = False


Delta = Reasoning | Content | CallStart | CallArguments | CallEnd


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with texts that follow each other joined, and without empty ones."""
    found: list[Delta] = []
    for delta in deltas:
        if isinstance(delta, (CallStart, CallEnd)):
            found.append(delta)
        elif found and _goes_on(found[-1], delta):
            found[-1] = replace(delta, text=found[-1].text + delta.text)  # type: ignore[union-attr]
        elif delta.text:
            found.append(delta)
    return found


def _goes_on(last: Delta, delta: Delta) -> bool:
    return type(last) is type(delta) and getattr(last, "index", 0) == getattr(delta, "index", 0)
