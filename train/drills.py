"""Drills: the same few facts stated again and again, each time in another order.

From the second time on, a fact's value can be told from its key. Up to every seventh token is such
a value, against one in fifty of a document with questions: looking up is learnt here first.
"""

import random
from dataclasses import dataclass

from ds4mlx.chat.tokens import BOS, USER
from ds4mlx.evaluation.recall import Filler, facts


@dataclass(frozen=True)
class Drill:
    """A text, and of every value that was stated before, its characters (begin, end)."""

    text: str
    values: tuple[tuple[int, int], ...]


def drill(rng: random.Random, count: int, rounds: int, filler: Filler, share: float) -> Drill:
    """`count` facts stated `rounds` times; a share of the statements is followed by filler.

    As a user's message, so that code alone is not taken for the beginning of such a text.
    """
    chosen = facts(rng, count, held_out=False)
    text, values = BOS + USER, []
    for turn in range(rounds):
        for fact in rng.sample(chosen, count):
            text += fact.sentence
            if turn:
                values.append((len(text) - len(f" {fact.value}."), len(text) - len(".")))
            text += "\n" + (filler(rng) if rng.random() < share else "")
    return Drill(text, tuple(values))
