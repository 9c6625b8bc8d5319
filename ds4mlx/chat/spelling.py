"""The tags of tool markup: the official spelling, and the laxer ones that models write.

Owns every pattern. What is official is exact to the character; at a place where only a tag can
stand, other marks, quotes, attributes and white space are read too. Text between the tags is
searched for one spelling alone, so that values may quote the others.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from ds4mlx.chat.tokens import DSML

OFFICIAL, MARKED, PLAIN = range(3)  # from the strictest spelling to the laxest

_BARS = "[｜|]?DSML[｜|]"
_MARKS = (DSML, _BARS, "")
_ANY = rf"(?:{_BARS}\s*)?"
_BLOCKS = "tool_?calls?|function_?calls?"
_VALUE = r'"[^"<>\n]*"|' + r"'[^'<>\n]*'|[“”][^“”<>\n]*[“”]|[‘’][^‘’<>\n]*[‘’]|[\w.-]+"
_ATTRIBUTES = rf"(?:\s+[\w:-]+\s*=\s*(?:{_VALUE}))*"
_ATTRIBUTE = re.compile(rf"\s+([\w:-]+)\s*=\s*({_VALUE})")
_TAG = rf"(?:invoke|parameter|{_BLOCKS})"
_FOLLOWS = rf"(?=\s*<\s*(?:{_ANY}invoke|/\s*{_ANY}(?:{_BLOCKS}))\b)"
# What the exact closing tag of a value looks like in each spelling.
_CLOSES = (
    f"</{DSML}parameter>",
    rf"<\s*/\s*{_BARS}\s*parameter\s*>",
    r"<\s*/\s*parameter\s*>",
)

BLOCK = re.compile(rf"\s*<\s*{_ANY}({_BLOCKS})\s*>")
BLOCK_TAGS = re.compile(rf"(?:\s*<\s*/?\s*{_ANY}(?:{_BLOCKS})\s*>)*\s*")
BLOCK_END = re.compile(rf"\s*<\s*/\s*{_ANY}(?:{_BLOCKS})\s*>")
PLAIN_START = re.compile(rf"<\s*(?:(?:{_BLOCKS})\s*>{_FOLLOWS}|invoke\s)")
_LAX_CALL_END = re.compile(rf"<\s*/\s*{_ANY}invoke\s*>")
CALL_END = re.compile(r"\s*" + _LAX_CALL_END.pattern)
_CALL = re.compile(rf"\s*<\s*{_ANY}invoke\b({_ATTRIBUTES})\s*>")
_PARAMETER = re.compile(rf"\s*<\s*{_ANY}parameter\b({_ATTRIBUTES})\s*>")
_TYPED = re.compile(rf'\s*<{_ANY}parameter\s+name="([^"]*)" string="(true|false)">')
# A key with quotes in it; no tag stands inside.
_ODD_KEY = re.compile(
    rf'\s*<{_ANY}parameter\s+name="((?:(?!</?{_ANY}{_TAG}\b)[\s\S]){{0,256}}?)"'
    r' string="(true|false)">'
)
# A name that an example would not have: no placeholder, no pattern.
_NAME = re.compile(r"\w(?:[\w.:/@ -]*\w)?")
_OPENS = re.compile(rf"\s*(?:<\s*/?\s*{_ANY}(?:parameter|invoke)\b|\{{|\Z)")
_QUOTES = ("`", "'", '"')


@dataclass(frozen=True)
class Opening:
    """An opening tag, text[start:end]: of a call, or of a parameter where `is_string` may be None.

    key: the span of its name in the text. slips: what of it is not official, in words.
    """

    name: str
    start: int
    end: int
    key: tuple[int, int]
    is_string: bool | None = None
    slips: tuple[str, ...] = ()


@dataclass(frozen=True)
class ValueEnd:
    """Where a value ends: at its closing tag, or at an opening, with no closing tag before it."""

    start: int
    end: int
    is_closed: bool


def call_at(text: str, at: int) -> Opening | None:
    """The opening tag of a call at `at`, behind white space, in any spelling."""
    tag = _CALL.match(text, at)
    return _opening(tag, 1) if tag else None


def parameter_at(text: str, at: int) -> Opening | None:
    """The opening tag of a parameter at `at`, behind white space, in any spelling."""
    exact, tag = _TYPED.match(text, at), _PARAMETER.match(text, at)
    read = _opening(tag, 1) if tag and not exact else None
    if read is None or read.is_string is None:
        exact = exact or _ODD_KEY.match(text, at)
    if exact is None:
        return read
    return Opening(exact[1], exact.start(), exact.end(), exact.span(1), exact[2] == "true")


def value_end(text: str, at: int, level: int, close: int) -> ValueEnd | None:
    """What ends the value that begins at `at`.

    level: the spelling in which an opening ends it. close: that of its closing tag.
    """
    return _first_edge(text, at, _edges(level, _CLOSES[close]))


def call_end(text: str, at: int, level: int) -> ValueEnd | None:
    """What ends a call whose body is no parameters, in one spelling."""
    return _first_edge(text, at, _edges(level, rf"<\s*/\s*{_MARKS[level]}\s*invoke\s*>"))


def lax_call_end(text: str, at: int, limit: int) -> int:
    """Where a call's closing tag stands before `limit`, in any spelling; `limit` without one."""
    tag = _LAX_CALL_END.search(text, at, limit)
    return tag.start() if tag else limit


def next_call(text: str, at: int, level: int) -> int | None:
    """Where the next call opens, in one spelling."""
    for tag in _tags(level).finditer(text, at):
        if tag["kind"] == "invoke" and _is_real(text, tag):
            return tag.start()
    return None


def next_block(text: str, at: int, level: int) -> int | None:
    """Where the next block of calls opens, in one spelling."""
    tag = _blocks(level).search(text, at)
    return tag.start() if tag else None


def opens(text: str, at: int) -> int | None:
    """The strictest spelling in which calls open at `at`, or None; plain tags on any line."""
    for level in (OFFICIAL, MARKED):
        tag = _tags(level).match(text, at)
        is_call = tag is not None and tag["kind"] == "invoke" and _is_real(text, tag)
        if is_call or _blocks(level).match(text, at):
            return level
    is_plain = PLAIN_START.match(text, at) and (BLOCK.match(text, at) or call_at(text, at))
    return PLAIN if is_plain else None


def is_close(text: str, at: int, close: int) -> bool:
    """Whether the closing tag of a value stands at `at`, in one spelling."""
    return re.compile(_CLOSES[close]).match(text, at) is not None


def ends_value(text: str, at: int, level: int) -> bool:
    """Whether a tag opens at `at` that ends a value which is not closed before it."""
    tag = _tags(level).match(text, at)
    return tag is not None and _is_real(text, tag)


def goes_on(text: str, at: int, level: int) -> bool:
    """Whether a closed block goes on at `at`: by a tag, or closed once more without an opening."""
    following = _block_tags(level).search(text, at)
    closes_again = following is not None and following["slash"] == "/"
    return closes_again or _any_tag(level).match(text, at) is not None


def last_close(text: str, close: int) -> int:
    """Where the last closing tag of a value stands in one spelling, -1 without one."""
    return max((tag.start() for tag in re.finditer(_CLOSES[close], text)), default=-1)


def _first_edge(text: str, at: int, edges: re.Pattern[str]) -> ValueEnd | None:
    for edge in edges.finditer(text, at):
        if edge["close"] or _is_real(text, edge):
            return ValueEnd(edge.start(), edge.end(), edge["close"] is not None)
    return None


def _opening(tag: re.Match[str], group: int) -> Opening | None:
    """Of the attributes name and string are read, whatever else stands there."""
    values, spans, slips = {}, {}, []
    for attribute in _ATTRIBUTE.finditer(tag.string, *tag.span(group)):
        key, raw = attribute[1], attribute[2]
        quoted = not re.match(r"[\w.-]", raw)
        if key in values:
            return None
        values[key] = raw[1:-1] if quoted else raw
        spans[key] = (attribute.start(2) + quoted, attribute.end(2) - quoted)
        if raw[0] != '"':
            slips.append(f"{key} without straight double quotes")
    kind = values.pop("string", None)
    name = values.pop("name", None)
    if not name or (kind is not None and kind.lower() not in ("true", "false")):
        return None
    slips += [f"the attribute {key:.80} of {name:.80} passed over" for key in values]
    is_string = None if kind is None else kind.lower() == "true"
    return Opening(name, tag.start(), tag.end(), spans["name"], is_string, tuple(slips))


def _is_real(text: str, tag: re.Match[str]) -> bool:
    """Whether an opening opens something, and is not just mentioned."""
    opening = _opening(tag, tag.re.groupindex["attributes"])
    start, end = tag.span("tag")
    if opening is None or (text[start - 1 : start] in _QUOTES and text[end : end + 1] in _QUOTES):
        return False
    if tag["kind"] == "parameter":
        return True
    return _NAME.fullmatch(opening.name) is not None and _OPENS.match(text, end) is not None


def _tag(level: int) -> str:
    mark = rf"<\s*{_MARKS[level]}\s*" if _MARKS[level] else r"<\s*"
    return rf"(?P<tag>{mark}(?P<kind>invoke|parameter)\b(?P<attributes>{_ATTRIBUTES})\s*>)"


@lru_cache
def _tags(level: int) -> re.Pattern[str]:
    return re.compile(_tag(level))


@lru_cache
def _any_tag(level: int) -> re.Pattern[str]:
    return re.compile(rf"\s*<\s*/?\s*{_MARKS[level]}\s*{_TAG}\b")


@lru_cache
def _block_tags(level: int) -> re.Pattern[str]:
    name = rf"\s*{_MARKS[level]}\s*(?:{_BLOCKS})\s*>"
    return re.compile(rf"<\s*(?:(?P<slash>/){name}|{name}{_FOLLOWS})")


@lru_cache
def _edges(level: int, close: str) -> re.Pattern[str]:
    block = rf"(?:<\s*{_MARKS[level]}\s*(?:{_BLOCKS})\s*>\s*(?=<))?"
    return re.compile(rf"(?P<close>{close})|{block}{_tag(level)}")


@lru_cache
def _blocks(level: int) -> re.Pattern[str]:
    return re.compile(rf"<\s*{_MARKS[level]}\s*(?:{_BLOCKS})\s*>{_FOLLOWS}")
