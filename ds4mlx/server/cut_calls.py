"""What is told at the end of an answer that was cut while it wrote calls.

At an end of its own, markup without an end is the model's mistake, and shown; here nobody has made
one.
"""

from dataclasses import replace
from typing import Any

from ds4mlx.chat.parse import CALLS_START
from ds4mlx.chat.streaming import Content, Delta
from ds4mlx.chat.tokens import DSML

CALLS_OPENING = f"\n{CALLS_START}"  # as it is written behind a text


def without_begun(message: dict[str, Any], given: str, last: list[Delta]) -> list[Delta]:
    """The last deltas of an answer without the markup of calls that it began; so is its message then.

    given: what all deltas give of the message's content. What was told before the last is no markup.
    """
    before = _before_further_calls if message["tool_calls"] else _before_calls
    cut = [replace(d, text=before(d.text)) if isinstance(d, Content) else d for d in last]
    message["content"] = given[: len(given) + _length(cut) - _length(last)]
    return [delta for delta in cut if not isinstance(delta, Content) or delta.text]


def _length(deltas: list[Delta]) -> int:
    return sum(len(delta.text) for delta in deltas if isinstance(delta, Content))


def _before_calls(text: str) -> str:
    """A text up to an opening of official calls, or to the beginning of one that ends it."""
    return _before(text, CALLS_OPENING, 3)


def _before_further_calls(text: str) -> str:
    """The text of a message with calls, up to what was begun behind them: a call, or their end."""
    return _before(_before(text, f"<{DSML}", 1), f"</{DSML}", 1).removesuffix("\n\n")


def _before(text: str, mark: str, least: int) -> str:
    """A text up to a mark, or to so many of its first characters, or more, where it ends with them."""
    before = text.partition(mark)[0]
    if len(before) < len(text):
        return before
    ends = (
        length for length in range(len(mark) - 1, least - 1, -1) if text.endswith(mark[:length])
    )
    return text[: len(text) - next(ends, 0)]
