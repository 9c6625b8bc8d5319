"""Long-range recall: facts planted in a long text, asked for at its end.

A document is a conversation. Its first message is filler text with facts between the lines
("Call the red fox tango."); every turn after it asks for one of them. Keys and values are drawn at
random, so nothing but the text can answer. One key in eight is held out: training never sees it.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ds4mlx.chat import encode_messages
from ds4mlx.evaluation.words import ADJECTIVES, NOUNS, VALUES

QUESTIONS = (
    "What do you call the {key}?",
    "What is the {key} called?",
    "Tell me what to call the {key}.",
)
HELD_OUT_SHARE = 8

Filler = Callable[[random.Random], str]


@dataclass(frozen=True)
class Fact:
    """A key with its value, e.g. "red fox" and "tango"."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """The fact as the document states it, and as an answer repeats it."""
        return f"Call the {self.key} {self.value}."


@dataclass(frozen=True)
class RecallDocument:
    """A conversation's full text, and where in it (in characters) facts stand and are asked for."""

    text: str
    asked: int  # where the first question begins, behind all facts
    planted: tuple[int, ...]  # of each asked fact: where its sentence begins in the first message
    answers: tuple[tuple[int, int], ...]  # of each: where its answer begins, and the value ends


def keys(held_out: bool) -> list[str]:
    """All keys of one split, in a fixed order."""
    pairs = [f"{a} {n}" for a in ADJECTIVES for n in NOUNS]
    return [k for k in pairs if (zlib.crc32(k.encode()) % HELD_OUT_SHARE == 0) == held_out]


KEYS = {held_out: keys(held_out) for held_out in (False, True)}


def facts(rng: random.Random, count: int, held_out: bool) -> list[Fact]:
    """`count` facts with different keys."""
    chosen = rng.sample(KEYS[held_out], count)
    return [Fact(key, rng.choice(VALUES)) for key in chosen]


def document(
    rng: random.Random,
    planted: int,
    asked: int,
    filler: Filler,
    held_out: bool = False,
    thinking: str = "none",
) -> RecallDocument:
    """A document with `planted` facts, a piece of filler before and after each, `asked` questions.

    `filler` gives the next piece of text; its length sets the document's.
    """
    all_facts = facts(rng, planted, held_out)
    pieces = [filler(rng)]
    for fact in all_facts:
        pieces += [fact.sentence + "\n", filler(rng)]
    chosen = rng.sample(all_facts, asked)
    body = "".join(pieces)
    text, answers = _conversation(rng, body, chosen, thinking)
    planted_at = tuple(text.index(fact.sentence) for fact in chosen)
    return RecallDocument(text, text.index(body) + len(body), planted_at, answers)


def _conversation(
    rng: random.Random, body: str, asked: list[Fact], thinking: str
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The rendered conversation, and each answer's place in it."""
    messages: list[dict[str, str]] = []
    for turn, fact in enumerate(asked):
        question = rng.choice(QUESTIONS).format(key=fact.key)
        messages.append(
            {"role": "user", "content": f"{body}\n{question}" if not turn else question}
        )
        messages.append({"role": "assistant", "content": fact.sentence})
    text = encode_messages(messages, thinking=thinking)
    return text, tuple(_places(text, asked))


def _places(text: str, asked: list[Fact]) -> Iterator[tuple[int, int]]:
    """Of each answer: its first character, and the end of its value."""
    end = 0
    for fact in asked:
        begin = text.index("</think>" + fact.sentence, end) + len("</think>")
        end = begin + len(fact.sentence)
        yield begin, end - len(".")
