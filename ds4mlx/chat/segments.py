"""Pieces of a prompt: the encoding's own markup, and text from outside.

Joined, they are the prompt's text. Apart, they tell a tokenizer where special tokens count: in the
markup, never in what a client, a tool or a model has written.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Segment(NamedTuple):
    """A piece of a prompt. A special token in markup lies within one segment."""

    text: str
    is_markup: bool


class Prompt(tuple[Segment, ...]):
    """A prompt in pieces, for `encode_segments` of a tokenizer or `encode` of a store."""

    @property
    def text(self) -> str:
        return joined(self)

    def tail(self, length: int) -> "Prompt":
        """The last `length` characters."""
        pieces: list[Segment] = []
        for piece in reversed(self):
            if length > 0:
                pieces.append(Segment(piece.text[-length:], piece.is_markup))
            length -= len(piece.text)
        return Prompt(reversed(pieces))


def markup(text: str) -> Segment:
    """A piece of the encoding's own."""
    return Segment(text, True)


def outside(text: str) -> Segment:
    """A piece that somebody else has written."""
    return Segment(text, False)


def joined(segments: Iterable[Segment]) -> str:
    """The text of the pieces."""
    return "".join(segment.text for segment in segments)


def divided(text: str, spans: Iterable[tuple[int, int]]) -> list[Segment]:
    """A text as pieces: what lies in the spans, which are in order, is from outside."""
    segments, at = [], 0
    for start, end in spans:
        segments += [markup(text[at:start]), outside(text[start:end])]
        at = end
    return [*segments, markup(text[at:])]
