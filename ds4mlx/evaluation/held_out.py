"""Text that the small model's training never sees: eleven modules of CPython 3.11's library.

They are © Python Software Foundation, under the licence in LICENSE-CPython.txt beside them.
"""

import random
from functools import lru_cache
from importlib import resources

from ds4mlx.evaluation.recall import Filler

MODULES = (
    *("statistics", "heapq", "fractions", "textwrap", "shlex", "graphlib", "calendar"),
    *("configparser", "gettext", "queue", "bisect"),
)


@lru_cache(maxsize=1)
def held_out_texts() -> tuple[str, ...]:
    """The source of each of MODULES."""
    file = resources.files("ds4mlx.evaluation").joinpath("held_out.txt")
    return tuple(file.read_text(encoding="utf-8").split("\f"))


def filler_of(texts: tuple[str, ...], characters: int) -> Filler:
    """Pieces of whole lines, about so many characters each, from random places of the texts."""

    def piece(rng: random.Random) -> str:
        text = rng.choice(texts)
        begin = text.find("\n", rng.randrange(max(1, len(text) - characters))) + 1
        end = text.find("\n", begin + characters)
        return text[begin : end + 1 if end >= 0 else len(text)].strip("\n") + "\n"

    return piece
