"""When a stored prefix may stand for the beginning of a prompt that is tokenised otherwise.

Tokens that were sampled need not be those that the tokenizer makes of their text, and a history comes
back as text. The stored ids are then taken for it, but only up to a safe place, and never where the
difference may come of the prefix having been cut off in the middle of a word.
"""

from collections.abc import Iterator
from itertools import accumulate, groupby

from ds4mlx.text.tokenizer import Tokenizer


def joined(tokenizer: Tokenizer, stored: list[int], ids: list[int]) -> list[int] | None:
    """`stored`, then those of `ids` that follow the same text; None if `stored` may not stand for it.

    ids: a prompt whose text begins with that of `stored`. The place where they meet must be one
    behind a special token, or where the tokenizer splits the prompt into words. The same special
    tokens must stand at the same places in both, so no text becomes one. The last word must be spelled
    alike, or the one before it unlike too: a word that was cut off differs alone.
    """
    ours, theirs = _ends(tokenizer, ids), _ends(tokenizer, stored)
    cut = theirs[-1] if theirs else 0
    splits = [0, *_splits(tokenizer, ids)]
    if cut not in splits or cut not in ours:
        return None
    count = ours.index(cut) + 1
    same = tokenizer.special_places(stored) == tokenizer.special_places(ids[:count])
    before = [place for place in splits if place < cut][-2:]
    alike = [
        _spelled(stored, theirs, first, last) == _spelled(ids, ours, first, last)
        for first, last in zip(before, [*before[1:], cut], strict=True)
    ]
    if not same or not alike or not (alike[-1] or alike == [False, False]):
        return None
    return [*stored, *ids[count:]]


def _ends(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Where each token's bytes end in the text."""
    return list(accumulate(len(tokenizer.token_bytes(token)) for token in ids))


def _spelled(ids: list[int], ends: list[int], first: int, last: int) -> list[int] | None:
    """The tokens of the bytes first..last-1; None where none begins or ends there."""
    if (first and first not in ends) or last not in ends:
        return None
    return [token for token, end in zip(ids, ends, strict=False) if first < end <= last]


def _splits(tokenizer: Tokenizer, ids: list[int]) -> Iterator[int]:
    """Where words end, in bytes: the tokenizer merges nothing across these places."""
    at = 0
    for special, run in groupby(ids, tokenizer.is_added):
        pieces = [tokenizer.token_bytes(token) for token in run]
        if special:
            yield from (at + end for end in accumulate(map(len, pieces)))
        else:
            yield from (at + end for end in tokenizer.word_ends(b"".join(pieces)))
        at += sum(map(len, pieces))
