"""Prefixes by their rendered text, so that a history that is tokenised otherwise is found again."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from ds4mlx.store.catalogue import Catalogue
from ds4mlx.store.items import Record
from ds4mlx.text.tokenizer import Tokenizer


def token_texts(tokenizer: Tokenizer) -> Callable[[np.ndarray], list[bytes]]:
    """A function from token ids to the bytes of each."""
    known: dict[int, bytes] = {}

    def pieces(tokens: np.ndarray) -> list[bytes]:
        for token in set(tokens.tolist()) - known.keys():
            known[token] = tokenizer.token_bytes(token)
        return [known[token] for token in tokens.tolist()]

    return pieces


def matches(catalogue: Catalogue, model: str, text: bytes) -> Iterator[Record]:
    """Records of prefixes whose text begins `text` and whose chains are whole, longest first."""
    ours = [r for r in catalogue.records.values() if r.model == model and r.text]
    ours = [r for r in ours if 0 < r.text_bytes <= len(text)]
    digest, done, names = hashlib.sha1(), 0, {}
    for size in sorted({record.text_bytes for record in ours}):
        digest.update(text[done:size])
        names[size], done = digest.hexdigest(), size
    equal = [record for record in ours if record.text == names[record.text_bytes]]
    for record in sorted(equal, key=lambda r: (r.text_bytes, r.created), reverse=True):
        if catalogue.chain(record.segment, record.tokens) is not None:
            yield record
