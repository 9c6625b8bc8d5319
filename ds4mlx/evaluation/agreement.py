"""How far a model's predictions are from a reference's: KL divergence and top-1 agreement.

The reference is another model, or saved logits. KL(reference || model) is in nats a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ds4mlx.engine.requests import check_ids
from ds4mlx.engine.sampling import log_probs
from ds4mlx.errors import DataError
from ds4mlx.evaluation.logits_file import LogitsFile, write_logits
from ds4mlx.evaluation.scoring import Mean, bar, logit_blocks
from ds4mlx.model.model import Model

SEQUENCES = 2


@dataclass(frozen=True)
class Agreement:
    """Over all tokens: KL divergence, and how often the likeliest token is the reference's."""

    reference: str
    kl: Mean
    kl_largest: float
    top1: Mean


def divergence(reference: mx.array, logits: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, vocab) of both -> KL(reference || other) float64 (n,), same likeliest bool (n,)."""
    p, q = log_probs(reference), log_probs(logits)
    gap = mx.where(mx.isinf(p), 0, p - q)  # what the reference excludes takes no part
    kl = (mx.exp(p) * gap).sum(-1)
    same = mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)
    return np.array(kl, np.float64), np.array(same)


def with_model(
    model: Model, reference: Model, sequences: Sequence[Sequence[int]], name: str
) -> Agreement:
    """Agreement on sequences of token ids. Raises DataError if the vocabularies differ in size."""
    if reference.args.vocab_size != model.args.vocab_size:
        raise DataError(
            f"{name}: its vocabulary has {reference.args.vocab_size} tokens, "
            f"the model's {model.args.vocab_size}"
        )
    pairs = []
    with bar("agreement", 2 * sum(map(len, sequences))) as progress:
        for ids in sequences:
            theirs = logit_blocks(reference, ids, progress)
            ours = logit_blocks(model, ids, progress)
            pairs += [divergence(r, o) for (_, r), (_, o) in zip(theirs, ours, strict=True)]
    return _gathered(name, pairs)


def with_file(model: Model, path: Path) -> list[Agreement]:
    """Agreement with each set of logits of a file, on its tokens. Raises DataError naming it."""
    saved = LogitsFile(path)
    for name in saved.names:
        if saved.vocabulary(name) != model.args.vocab_size:
            raise DataError(
                f"{path}: tensor {name} has {saved.vocabulary(name)} logits a token, "
                f"the model {model.args.vocab_size}"
            )
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in saved.names}
    with bar("agreement", saved.tokens.size) as progress:
        for number, ids in enumerate(saved.tokens):
            _check(model, ids, path)
            for first, logits in logit_blocks(model, ids.tolist(), progress):
                for name, found in pairs.items():
                    rows = saved.rows(name, number, first, len(logits))
                    found.append(divergence(rows, logits))
    saved.file.close()
    return [_gathered(f"{path}: {name}", found) for name, found in pairs.items()]


def save_logits(model: Model, sequences: Sequence[Sequence[int]], path: Path) -> None:
    """Write the model's logits for sequences of one length."""

    def blocks() -> Iterator[mx.array]:
        with bar("logits", sum(map(len, sequences))) as progress:
            for ids in sequences:
                for _, logits in logit_blocks(model, ids, progress):
                    yield logits

    write_logits(path, sequences, model.args.vocab_size, blocks())


def spread_sequences(
    text: Sequence[int], bos: int, length: int, most: int = SEQUENCES
) -> list[list[int]]:
    """Up to `most` sequences of `length` tokens from all over a text, each begun with `bos`.

    A shorter text is one shorter sequence. Raises DataError for an empty one.
    """
    if not len(text):
        raise DataError("the text is empty")
    body = min(length - 1, len(text))
    count = max(1, min(most, len(text) // body))
    begins = [(len(text) - body) * n // max(1, count - 1) for n in range(count)]
    return [[bos, *(int(i) for i in text[begin : begin + body])] for begin in begins]


def _gathered(name: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Agreement:
    kl = np.concatenate([kl for kl, _ in pairs])
    if not np.isfinite(kl).all():
        raise DataError(f"{name}: the logits, or the model's, are not all finite")
    same = np.concatenate([same for _, same in pairs])
    return Agreement(name, Mean.of(kl), float(kl.max()), Mean.of(same.astype(np.float64)))


def _check(model: Model, ids: np.ndarray, path: Path) -> None:
    try:
        check_ids(model.args, ids.tolist())
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
