"""Completions with tool calls built from a grammar, and one piece of damage done to them.

Each call carries a mark of its own in every value, so that it is seen where a text ended up.
"""

import json
import random
import string
from dataclasses import dataclass, field

from chat_messages import EOS

MARK = "｜DSML｜"
NAMES = ["bash", "read_file", "get-weather", "mcp__git__log", "f", "write.file", "Edit", "search2"]
KEYS = ["command", "path", "old_string", "n", "items", "q", "é", "file-name"]
# What values and texts quote: other spellings of the markup, and talk about the official one.
QUOTES = [
    '<tool_calls>\n<invoke name="g">\n<parameter name="x">1</parameter>\n</invoke>\n</tool_calls>',
    '<|DSML|invoke name="g"><|DSML|parameter name="x" string="true">1</|DSML|parameter>',
    "</parameter>\n</invoke>\n</tool_calls>",
    "</DSML｜parameter>",
    "re.compile(r'<｜DSML｜invoke name=\"(.*?)\">')",
    "CALLS := { '<｜DSML｜invoke name=\"' NAME '\">\\n' { PARAM } }",
    '`<｜DSML｜invoke name="f">` opens a call, `<｜DSML｜tool_calls>` a block',
    '<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE',
    "</｜DSML｜invoke>",
    '<function_calls><invoke name="h"></invoke></function_calls>',
    "</think>",
    EOS,
]
TALK = ["a < b && c > d", "x" * 40, "naïve 🦊 — ok", '{"a": [1, "b"]}', "line\n\n  line", "'", '"']
TALK += ["if x:\n\tpass\n", "1 << 3", "</p><p>", "\\n", "", " ", "\n"]
SAFE = ["Let me look.", "I'll call it:", "naïve — ok\n\nNow", "a < b", "Use `<tool_calls>`.", ""]


@dataclass
class Piece:
    """A tag or a value; `owner` is its call's index, -1 where it belongs to none."""

    text: str
    owner: int = -1
    is_tag: bool = False


@dataclass
class Completion:
    """A generated completion: pieces, and what its calls are: name, arguments, mark."""

    thinking: str
    reasoning: str
    content: str
    pieces: list[Piece] = field(default_factory=list)
    calls: list[tuple[str, dict]] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        opening = f"{self.reasoning}</think>" if self.thinking != "none" else ""
        return f"{opening}{self.content}\n\n"

    @property
    def text(self) -> str:
        return self.head + "".join(piece.text for piece in self.pieces)


def completion(rng: random.Random) -> Completion:
    """A completion in the official form, with one to four calls."""
    made = Completion(rng.choice(["none", "high"]), rng.choice(SAFE), rng.choice(SAFE))
    add = made.pieces.append
    add(Piece(f"<{MARK}tool_calls>", -1, True))
    add(Piece("\n"))
    for owner in range(rng.randint(1, 4)):
        mark = f"m{owner}" + "".join(rng.choices(string.ascii_lowercase, k=6))
        name, arguments = rng.choice(NAMES) + str(owner), {}
        made.marks.append(mark)
        add(Piece(f'<{MARK}invoke name="{name}">', owner, True))
        add(Piece("\n", owner))
        for key in rng.sample(KEYS, rng.randint(0, 3)):
            arguments[key] = value(rng, mark)
            add_parameter(made.pieces, key, arguments[key], owner)
        if not arguments:
            add(Piece("\n", owner))
        add(Piece(f"</{MARK}invoke>", owner, True))
        add(Piece("\n"))
        made.calls.append((name, arguments))
    add(Piece(f"</{MARK}tool_calls>", -1, True))
    add(Piece(rng.choice(["", EOS])))
    return made


def add_parameter(pieces: list[Piece], key: str, given: object, owner: int) -> None:
    kind = "true" if isinstance(given, str) else "false"
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    pieces.append(Piece(f'<{MARK}parameter name="{key}" string="{kind}">', owner, True))
    pieces.append(Piece(text, owner))
    pieces.append(Piece(f"</{MARK}parameter>", owner, True))
    pieces.append(Piece("\n", owner))


def value(rng: random.Random, mark: str) -> object:
    parts = [rng.choice(QUOTES if rng.random() < 0.3 else TALK) for _ in range(rng.randint(0, 4))]
    parts.insert(rng.randint(0, len(parts)), mark)
    text = "".join(parts)
    kind = rng.random()
    if kind < 0.7:
        return text
    if kind < 0.8:
        return [1, None, {"k": text}]
    return rng.choice([{"a": [mark]}, {"deep": {"x": [True, 1.5, mark]}}])


@dataclass
class Damaged:
    """A damaged text: the calls that the damage did not touch, and those whose name is left."""

    kind: str
    text: str
    untouched: list[int]
    named: list[int]


def damage(rng: random.Random, made: Completion) -> Damaged:
    """The completion with one piece of damage done to its calls."""
    kind = rng.choice(DAMAGES)
    pieces = [Piece(piece.text, piece.owner, piece.is_tag) for piece in made.pieces]
    touched = kind(rng, pieces)
    text = "".join(piece.text for piece in pieces)
    everyone = range(len(made.calls))
    return Damaged(
        kind.__name__,
        made.head + text,
        [index for index in everyone if index not in touched],
        [index for index in everyone if f'"{made.calls[index][0]}"' in text],
    )


def _tag(rng, pieces):
    index = rng.choice([i for i, piece in enumerate(pieces) if piece.is_tag])
    return index, pieces[index]


def _owned(*pieces):
    return {piece.owner for piece in pieces if piece.owner >= 0}


def _places(text):
    """Of a tag, the places that are no part of a name."""
    start = text.find('name="') + 6 if 'name="' in text else len(text)
    end = text.index('"', start) if start < len(text) else start
    return [i for i in range(len(text)) if not start <= i < end]


def lose_character(rng, pieces):
    _, tag = _tag(rng, pieces)
    at = rng.choice(_places(tag.text))
    tag.text = tag.text[:at] + tag.text[at + 1 :]
    return _owned(tag)


def change_character(rng, pieces):
    _, tag = _tag(rng, pieces)
    at = rng.choice(_places(tag.text))
    tag.text = tag.text[:at] + rng.choice("abcxyz<>/\"'=| \n｜") + tag.text[at + 1 :]
    return _owned(tag)


def add_character(rng, pieces):
    _, tag = _tag(rng, pieces)
    at = rng.choice(_places(tag.text))
    tag.text = tag.text[:at] + rng.choice("abcxyz<>/\"'=| \n｜") + tag.text[at:]
    return _owned(tag)


def lose_tag(rng, pieces):
    _, tag = _tag(rng, pieces)
    tag.text = ""
    return _owned(tag)


def double_tag(rng, pieces):
    _, tag = _tag(rng, pieces)
    tag.text *= 2
    return _owned(tag)


def misspell_tag(rng, pieces):
    _, tag = _tag(rng, pieces)
    for word, others in {
        "parameter": ["param", "arg", "parameters", "argument"],
        "invoke": ["call", "tool_call", "invocation", "invokes"],
        "tool_calls": ["tools", "calls", "tool_calling"],
    }.items():
        tag.text = tag.text.replace(word, rng.choice(others))
    return _owned(tag)


def other_mark(rng, pieces):
    _, tag = _tag(rng, pieces)
    tag.text = tag.text.replace(MARK, rng.choice(["", "DSML｜", "|DSML|", "｜DSML", "DSML"]))
    return _owned(tag)


def other_tag(rng, pieces):
    _, tag = _tag(rng, pieces)
    name = tag.text if "invoke name" in tag.text else ""
    tag.text = rng.choice([f"</{MARK}tool_calls>", f"</{MARK}invoke>", f"</{MARK}parameter>"])
    tag.text += name[name.find(" ") :] if name else ""
    return _owned(tag)


def other_quotes(rng, pieces):
    _, tag = _tag(rng, pieces)
    tag.text = tag.text.replace('"', rng.choice(["'", "”", ""]))
    return _owned(tag)


def add_junk(rng, pieces):
    """Between two calls, or after the last."""
    index = rng.choice([i for i, p in enumerate(pieces) if p.owner < 0 and p.text == "\n"])
    pieces[index].text = rng.choice(["", "\n\n", "\nNow the next:\n", "junk", "<br>", "\n```\n"])
    return set()


def cut(rng, pieces):
    index = rng.randrange(len(pieces))
    start = pieces[index]
    start.text = start.text[: rng.randint(0, len(start.text))]
    touched = _owned(start, *pieces[index + 1 :])
    del pieces[index + 1 :]
    return touched


DAMAGES = [lose_character, change_character, add_character, lose_tag, double_tag, misspell_tag]
DAMAGES += [other_mark, other_tag, other_quotes, add_junk, cut]
