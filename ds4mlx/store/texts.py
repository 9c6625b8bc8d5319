"""Prefixes by their rendered text, so that a history that is tokenised otherwise is found again."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ds4mlx.store.catalogue import Catalogue, Record
from ds4mlx.text.tokenizer import Tokenizer


def token_texts(tokenizer: Tokenizer) -> Callable[[np.ndarray], list[bytes]]:
    """A function from token ids to the bytes of each."""
    known: dict[int, bytes] = {}

    def pieces(tokens: np.ndarray) -> list[bytes]:
        for token in set(tokens.tolist()) - known.keys():
            known[token] = tokenizer.token_bytes(token)
        return [known[token] for token in tokens.tolist()]

    return pieces


def have_same_specials(tokenizer: Tokenizer, prefix: Sequence[int], ids: Sequence[int]) -> bool:
    """Whether special tokens stand in `prefix` where they stand in `ids`, which has its text.

    A text from outside may spell a special token: as such it is not what was stored, or is not
    what is asked for.
    """
    size = sum(len(tokenizer.token_bytes(token)) for token in prefix)
    wanted = [place for place in tokenizer.special_places(ids) if place[0] < size]
    return tokenizer.special_places(prefix) == wanted


def matches(catalogue: Catalogue, model: str, text: bytes) -> Iterator[tuple[Record, str]]:
    """Records whose text begins `text`, longest first, with what follows it."""
    ours = [r for r in catalogue.records.values() if r.model == model and r.text]
    ours = [r for r in ours if 0 < r.text_bytes <= len(text)]
    digest, done, names = hashlib.sha1(), 0, {}
    for size in sorted({record.text_bytes for record in ours}):
        digest.update(text[done:size])
        names[size], done = digest.hexdigest(), size
    found = [record for record in ours if record.text == names[record.text_bytes]]
    for record in sorted(found, key=lambda r: (r.text_bytes, r.created), reverse=True):
        if catalogue.chain(record.segment, record.tokens) is None:
            continue
        try:
            yield record, text[record.text_bytes :].decode()
        except UnicodeDecodeError:  # the prefix ends inside a character
            continue
