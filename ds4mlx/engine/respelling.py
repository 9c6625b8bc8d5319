"""Prompts spelled in the tokens of a kept state, where that was sampled as other tokens.

A history comes back as text. Its tokens then need not be those that were sampled, and the state of
those is of no use unless the prompt is spelled as they are. See `store.spelling` for when it may be.
"""

from collections.abc import Callable, Iterator, Sequence

from ds4mlx.store import spelling
from ds4mlx.text.tokenizer import Tokenizer

# How many ends of turns are tried, the last that fit first.
TRIED = 3


def respelled(
    tokenizer: Tokenizer,
    pieces: Callable[[Sequence[int]], list[bytes]],
    kept: Sequence[int],
    ids: Sequence[int],
    shared: int,
) -> list[int] | None:
    """`ids` with more of their beginning spelled as in `kept`; None if there is nothing to gain.

    shared: how many tokens are the same. pieces: the bytes of each of some tokens.
    """
    if not _may_say_the_same(pieces(kept[shared : shared + 4]), pieces(ids[shared : shared + 4])):
        return None
    start = next((n for n in range(shared, 0, -1) if tokenizer.is_added(ids[n - 1])), 0)
    ours, theirs = list(ids[start:]), kept[start:]
    text, said = b"".join(pieces(ours)), pieces(theirs)
    ends = _ends_of_turns(tokenizer, theirs, said, text, shared - start)
    for end in list(ends)[-1 : -1 - TRIED : -1]:
        joined = spelling.joined(tokenizer, list(theirs[:end]), ours)
        if joined is not None:
            return [*ids[:start], *joined]
    return None


def _may_say_the_same(ours: list[bytes], theirs: list[bytes]) -> bool:
    """Whether the first token of one lies within the text of the other's first ones."""
    one, other = b"".join(ours), b"".join(theirs)
    if not ours or not theirs:
        return False
    return one.startswith(theirs[0]) or other.startswith(ours[0])


def _ends_of_turns(
    tokenizer: Tokenizer, tokens: Sequence[int], pieces: list[bytes], text: bytes, least: int
) -> Iterator[int]:
    """Lengths beyond `least` at which a special token begins or ends, or all ends, as long as the
    text goes on as `text` does."""
    at = 0
    for place, (token, piece) in enumerate(zip(tokens, pieces, strict=True)):
        if place > least and (tokenizer.is_added(token) or tokenizer.is_added(tokens[place - 1])):
            yield place
        if not text.startswith(piece, at):
            return
        at += len(piece)
    yield len(tokens)
