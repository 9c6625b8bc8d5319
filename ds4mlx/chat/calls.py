"""The tool calls in a model's text, and what stands between them.

A call that is broken is passed over, never guessed at, and what follows it is read. The official
spelling is preferred to the laxer ones, so that a text before the calls may quote those.
"""

import re
from bisect import bisect
from dataclasses import dataclass, field

from ds4mlx.chat import spelling
from ds4mlx.chat.markup import Call
from ds4mlx.chat.reading import Reading, Span, read_call
from ds4mlx.chat.tokens import EOS

_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_BLANK = re.compile(rf"\s*(?:{re.escape(EOS)}|\Z)")


@dataclass
class CallBlock:
    """Calls that follow each other, at text[start:end].

    between: spans of what was passed over between them. broken: the calls among that, each with
        the number of calls before it. slips: what was read although it is not official.
    has_opening, has_closing: whether the tags around the calls were there.
    values: spans that are no markup: names, keys and values.
    """

    start: int
    end: int
    calls: list[Call] = field(default_factory=list)
    between: list[Span] = field(default_factory=list)
    broken: list[tuple[int, Reading]] = field(default_factory=list)
    slips: list[str] = field(default_factory=list)
    values: list[Span] = field(default_factory=list)
    has_opening: bool = False
    has_closing: bool = False

    @property
    def is_sound(self) -> bool:
        """Whether nothing was passed over, and its end is certain."""
        return not (self.between or self.broken) and self.has_closing >= self.has_opening


def find_calls(text: str, limit: int | None = None) -> CallBlock | None:
    """The calls in `text`, or None; they open before `limit`. A few passes over the text."""
    limit = len(text) if limit is None else limit
    closes = [spelling.last_close(text, close) for close in range(3)]
    official = _first(text, limit, spelling.OFFICIAL, closes)
    for level in (spelling.MARKED, spelling.PLAIN):
        lax = _first(text, limit, level, closes)
        if lax is None or (official and official.start <= lax.start):
            continue
        # An official block is real, unless it is quoted in a value of calls that end the turn.
        if official is None or (official.start < lax.end and _is_whole(text, lax)):
            return lax
    return official


def ends_turn(text: str, at: int) -> bool:
    """Whether nothing but white space is left of the turn."""
    return _BLANK.match(text, at) is not None


def _first(text: str, limit: int, level: int, closes: list[int]) -> CallBlock | None:
    """The first calls in one spelling."""
    if level == spelling.PLAIN:
        return _first_plain(text, limit, closes)
    block, call = spelling.next_block(text, 0, level), spelling.next_call(text, 0, level)
    start = min((place for place in (block, call) if place is not None), default=limit)
    return _read(text, start, level, closes) if start < limit else None


def _first_plain(text: str, limit: int, closes: list[int]) -> CallBlock | None:
    """Plain tags count at the start of a line outside code, lest talk be taken for a call.

    Without a block around them, only if the turn ends with them and nothing is amiss.
    """
    fences = [fence.start() for fence in _FENCE.finditer(text)]
    at = 0
    while (start := _next_plain(text, at)) is not None and start < limit:
        at = start + 1
        if bisect(fences, start) % 2 or text[text.rfind("\n", 0, start) + 1 : start].strip():
            continue
        if spelling.BLOCK.match(text, start):
            return _read(text, start, spelling.PLAIN, closes)
        block = _read_block(text, start, spelling.PLAIN, spelling.PLAIN, strict=True)
        if block.calls and _is_whole(text, block):
            return block
        at = max(at, block.end)
    return None


def _next_plain(text: str, at: int) -> int | None:
    tag = spelling.PLAIN_START.search(text, at)
    return tag.start() if tag else None


def _read(text: str, start: int, level: int, closes: list[int]) -> CallBlock:
    """The calls at `start`. Laxer closing tags count only where all is sound with them."""
    if closes[level] < start:
        for close in range(level + 1, 3):
            if closes[close] >= start:
                block = _read_block(text, start, level, close)
                if block.calls and _is_whole(text, block):
                    return block
    return _read_block(text, start, level, level)


def _is_whole(text: str, block: CallBlock) -> bool:
    return block.is_sound and ends_turn(text, block.end)


def _read_block(text: str, start: int, level: int, close: int, strict: bool = False) -> CallBlock:
    """The calls at `start`; if `strict`, up to the first that is broken."""
    block = CallBlock(start, start)
    if opening := spelling.BLOCK.match(text, start):
        block.has_opening, block.end = True, opening.end()
        if opening[1] != "tool_calls":
            block.slips.append(f"a block named {opening[1]}")
    else:
        block.slips.append("no block around the calls")
    while not block.has_closing:
        reading = read_call(text, block.end, level, close)
        if reading.call is not None:
            _add(block, reading)
        elif (strict and not spelling.BLOCK_END.match(text, block.end)) or not _pass_on(
            text, block, reading, level
        ):
            break
    return block


def _add(block: CallBlock, reading: Reading) -> None:
    assert reading.call is not None
    block.calls.append(reading.call)
    block.slips += reading.slips
    block.values += reading.values
    block.end = reading.end


def _pass_on(text: str, block: CallBlock, reading: Reading, level: int) -> bool:
    """Where no call could be read: on to the closing tag or the next call; whether there is one."""
    closing = spelling.BLOCK_END.match(text, block.end)
    goes_on = not closing or spelling.goes_on(text, closing.end(), level)
    following = None
    if goes_on:
        following = spelling.next_call(text, max(block.end, reading.end), level)
    if closing and following is None:
        block.end, block.has_closing = closing.end(), True
        return True
    if reading.name:
        block.broken.append((len(block.calls), reading))
    if following is None:
        return False
    if spelling.BLOCK_TAGS.fullmatch(text, block.end, following):
        block.slips.append("several blocks of calls")
    else:
        block.between.append((block.end, following))
    block.end = following
    return True
