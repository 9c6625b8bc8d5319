"""Perplexity against depth: how well a token is predicted with so many tokens before it.

So that depths can be compared, all of them are measured on the same tokens: stretches of the text,
each a quarter of the context long, that windows beginning further and further back lead up to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.evaluation.scoring import Mean, bar, read, target_scores
from ds4mlx.model.model import Model

BUCKETS = 4
STRETCHES = 2


@dataclass(frozen=True)
class Depth:
    """The tokens that have `first` to `end` - 1 tokens of the text before them."""

    first: int
    end: int
    perplexity: float
    loss: Mean  # nats a token
    rise: Mean  # of the same tokens' losses, against the bucket before; nothing where not the same


@dataclass(frozen=True)
class Perplexity:
    """What a text came to. `same_text`: every bucket holds the same tokens."""

    perplexity: float
    tokens: int  # that were predicted, each as often as there are buckets
    context: int
    same_text: bool
    depths: list[Depth]


@dataclass(frozen=True)
class Window:
    """Text tokens start..end - 1 are read; those from `scored` on are measured."""

    start: int
    scored: int
    end: int


def trained_length(model: Model) -> int:
    """The context that a model was trained at before YaRN stretched it, or all that it has."""
    limit = model.args.max_position_embeddings
    return min(model.args.rope_scaling.original_max_position_embeddings or limit, limit)


def perplexity(
    model: Model,
    text: Sequence[int],
    bos: int,
    context: int | None = None,
    stretches: int = STRETCHES,
) -> Perplexity:
    """Perplexity of a text of token ids, by depth up to `context` tokens.

    Every window begins with the token `bos`. A text no longer than the context is read once, so
    that its buckets hold different tokens; of a longer one, `stretches` evenly spread stretches are
    measured at every depth. context: default `trained_length`.
    Raises DataError for an empty text, or a context of less or beyond the model's.
    """
    context = trained_length(model) if context is None else context
    if not 8 <= context <= model.args.max_position_embeddings:
        limit = model.args.max_position_embeddings
        raise DataError(f"the context must have 8 to {limit} tokens, not {context}")
    if not len(text):
        raise DataError("the text is empty")
    if len(text) < context:
        width = -(-len(text) // BUCKETS)
        losses = _losses(model, text, bos, [Window(0, 0, len(text))])
        return _report(_by_depth(losses[0], width), width, len(text) + 1, False)
    width = (context - 1) // BUCKETS
    plan = windows(len(text), width, stretches)
    losses = _losses(model, text, bos, [window for stretch in plan for window in stretch])
    buckets = [np.concatenate(losses[bucket::BUCKETS]) for bucket in range(BUCKETS)]
    return _report(buckets, width, context, True)


def windows(length: int, width: int, stretches: int) -> list[list[Window]]:
    """For each stretch of `width` tokens, a window for every bucket of depths.

    Bucket b scores, over all windows, each token at a depth of b * width to (b + 1) * width - 1:
    a window that begins b * width before the stretch.
    """
    first, last = (BUCKETS - 1) * width, length - width
    stretches = max(1, min(stretches, (last - first) // width + 1))
    begins = [first + (last - first) * n // max(1, stretches - 1) for n in range(stretches)]
    return [
        [Window(begin - b * width, begin, begin + width) for b in range(BUCKETS)]
        for begin in begins
    ]


def _losses(model: Model, text: Sequence[int], bos: int, plan: list[Window]) -> list[np.ndarray]:
    """Losses in nats of the scored tokens of each window."""
    found = []
    with bar("perplexity", sum(w.end - w.start + 1 for w in plan)) as progress:
        for window in plan:
            ids = [bos, *(int(i) for i in text[window.start : window.end])]
            before = window.scored - window.start
            cache = read(model, ids[:before], progress)
            scores, _ = target_scores(model, ids[before:], progress, cache=cache)
            found.append(-scores)
    return found


def _by_depth(losses: np.ndarray, width: int) -> list[np.ndarray]:
    return [losses[start : start + width] for start in range(0, len(losses), width)]


def _report(buckets: list[np.ndarray], width: int, context: int, same_text: bool) -> Perplexity:
    depths = []
    for number, losses in enumerate(buckets):
        before = buckets[number - 1] if same_text and number else losses[:0]
        rise = Mean.of(losses - before) if len(before) else Mean.of([])
        mean = Mean.of(losses)
        end = number * width + len(losses) if not same_text else (number + 1) * width
        depths.append(Depth(number * width, end, math.exp(mean.value), mean, rise))
    every = np.concatenate(buckets)
    tokens = len(buckets[0]) if same_text else len(every)
    return Perplexity(math.exp(float(every.mean())), tokens, context, same_text, depths)
