"""Recall accuracy by distance: how often the value of a fact planted far back comes out right.

An answer is right if every token of it, up to the end of the value, is the likeliest one after
those before: then greedy generation gives the same answer, and one reading of a document judges
all of its questions. Questions and answers are read again with each kind of compressed rows hidden,
after the same document. Distance: tokens from the end of the planted fact to the answer's beginning.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.evaluation.held_out import filler_of, held_out_texts
from ds4mlx.evaluation.masking import RATIOS, hidden_rows
from ds4mlx.evaluation.recall import RecallDocument, document
from ds4mlx.evaluation.scoring import Mean, bar, read, target_scores
from ds4mlx.model.model import Model
from ds4mlx.text.tokenizer import Tokenizer

SEED = 7
# Distances at which a new bucket begins; the first is the window and stands for the model's own.
EDGES = (512, 2048, 4096)
# "Among many": this many CSA rows, and this many times the indexer's choice.
MANY_ROWS, MANY_CHOICES = 1000, 8


@dataclass(frozen=True)
class Plan:
    """Documents of one length."""

    documents: int
    tokens: int  # about so many each
    planted: int
    asked: int


PLANS = (Plan(20, 700, 5, 4), Plan(5, 7900, 20, 16))


@dataclass(frozen=True)
class Question:
    """One answer: how far back its fact ends, where it begins, and whether it was right."""

    distance: int
    position: int
    right: bool


@dataclass(frozen=True)
class Distance:
    """The questions whose distance is `first` to `end` - 1 tokens (end None: any above)."""

    first: int
    end: int | None
    accuracy: Mean


@dataclass(frozen=True)
class Accuracy:
    """Accuracy by distance, and where the fact is one of many CSA rows beyond all windows."""

    hidden: str | None  # the kind of rows that no query saw
    distances: list[Distance]
    among_many_rows: Mean
    all: Mean


@dataclass(frozen=True)
class Recall:
    """What the documents came to; `rows`, `reach`: what counts as among many rows."""

    rows: int  # CSA rows there are, at least
    reach: int  # tokens that the windows of all layers reach back together
    results: list[Accuracy]


def recall_accuracy(
    model: Model,
    tokenizer: Tokenizer,
    plans: Sequence[Plan] = PLANS,
    hide: Sequence[str] = tuple(RATIOS),
    seed: int = SEED,
) -> Recall:
    """Accuracy on documents with held-out keys and filler; then with each kind of row hidden.

    Raises DataError if a document is longer than the model's context, or nothing is asked.
    """
    found = [each for plan in plans for each in documents(plan, tokenizer, seed)]
    answered: dict[str | None, list[Question]] = {kind: [] for kind in (None, *hide)}
    with bar("recall", len(found), "documents") as progress:
        for each in found:
            for kind, questions in readings(model, tokenizer, each, hide):
                answered[kind] += questions
            progress.update()
    if not answered[None]:
        raise DataError("recall: no document asks for anything")
    results = [by_distance(model, questions, kind) for kind, questions in answered.items()]
    return Recall(_many_rows(model), _reach(model), results)


def documents(plan: Plan, tokenizer: Tokenizer, seed: int) -> list[RecallDocument]:
    """The plan's documents; the same for the same tokenizer and seed."""
    texts, rng = held_out_texts(), random.Random(seed)
    sample = "\n".join(texts)[:65536]
    per_token = len(sample) / max(1, len(tokenizer.encode(sample)))
    talk = 24 * plan.asked + 12 * plan.planted  # tokens of questions, answers and facts
    pieces = plan.planted + 1
    characters = max(16, int((plan.tokens - talk) * per_token / pieces) - 18)  # half a line more
    filler = filler_of(texts, characters)
    return [
        document(rng, plan.planted, plan.asked, filler, held_out=True)
        for _ in range(plan.documents)
    ]


def readings(
    model: Model, tokenizer: Tokenizer, found: RecallDocument, hide: Sequence[str] = ()
) -> Iterator[tuple[str | None, list[Question]]]:
    """A document's answers, judged: with no rows hidden (None), then with each kind of `hide`."""
    encoded = tokenizer.encoder.encode(found.text, add_special_tokens=False)
    starts = np.array([start for start, _ in encoded.offsets])
    known = int(np.searchsorted(starts, found.asked))
    cache = read(model, encoded.ids[:known])
    for kind in (None, *hide):
        with hidden_rows(model, kind) if kind else contextlib.nullcontext():
            _, leads = target_scores(model, encoded.ids[known:], cache=cache)
        yield kind, judged(found, starts, np.concatenate([np.zeros(known, bool), leads]))
        cache.rewind(known)


def judged(found: RecallDocument, starts: np.ndarray, leads: np.ndarray) -> list[Question]:
    """The questions of a document whose tokens begin at characters `starts` (T,), ascending.

    leads: bool (T - 1,), whether token i + 1 is the likeliest after those before it.
    """
    judged = []
    for planted, (begin, end) in zip(found.planted, found.answers, strict=True):
        first, last = np.searchsorted(starts, [begin, end])  # tokens first..last - 1
        fact_end = np.searchsorted(starts, planted + end - begin) - 1
        right = bool(leads[first - 1 : last - 1].all())
        judged.append(Question(int(first - fact_end), int(first), right))
    return judged


def by_distance(model: Model, answered: list[Question], hidden: str | None = None) -> Accuracy:
    """Questions gathered by their distance."""
    window = model.args.sliding_window
    starts = [0, *(edge for edge in (window, *EDGES) if edge >= window)]
    distances = []
    for first, end in zip(starts, [*starts[1:], None], strict=True):
        inside = [q for q in answered if first <= q.distance and (end is None or q.distance < end)]
        distances.append(Distance(first, end, _share(inside)))
    rows, reach = _many_rows(model), _reach(model)
    many = [q for q in answered if q.position // RATIOS["CSA"] >= rows and q.distance >= reach]
    return Accuracy(hidden, distances, _share(many), _share(answered))


def _share(answered: list[Question]) -> Mean:
    return Mean.of(float(q.right) for q in answered)


def _many_rows(model: Model) -> int:
    return max(MANY_ROWS, MANY_CHOICES * model.args.index_topk)


def _reach(model: Model) -> int:
    return model.args.sliding_window * model.args.num_hidden_layers
