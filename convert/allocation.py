"""The formats that cost least in a budget of bytes: what `q2-auto` chooses among, and how.

What a format costs at a place is the sensitivity there times the relative square error of the products
of a few experts, as importances and second moments predict it.
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ds4mlx.convert.choice import Choice, Place, place_of
from ds4mlx.convert.encoder import Encoder
from ds4mlx.convert.importance import Importance
from ds4mlx.convert.moments import Moments
from ds4mlx.convert.plan import OutEntry, Plan
from ds4mlx.convert.quantise import quantisers_version
from ds4mlx.convert.sensitivity import Sensitivity
from ds4mlx.convert.sources import Source
from ds4mlx.errors import DataError
from ds4mlx.weights.inventory import Entry, experts

# What is tried in each role beside the exact format, the smallest first: that of the official experts
# leaves no room for Q4_K, which is larger.
ROUNDED = {"gate_up": ("iq2_xxs", "q2_k"), "down": ("q2_k",)}
# Experts of a layer that are rounded to see what is lost.
SAMPLE = 4

Stacks = Mapping[Place, list[Entry]]
Sizes = Mapping[Place, Mapping[str, int]]


class Basis(NamedTuple):
    """Of what a choice is made; budget: the most bytes that all weight files may take."""

    source: Source
    importance: Importance | None
    moments: Moments | None
    sensitivity: Sensitivity
    budget: int

    def digest(self, choice: Choice) -> str:
        """Digest of all that decides a choice, and of its formats, which may have been edited."""
        sides = (self.importance, self.moments, self.sensitivity)
        files = [each and each.fingerprint for each in sides]
        parts = [self.source.fingerprint(), *files, quantisers_version(), self.budget, SAMPLE]
        return hashlib.sha256(json.dumps([*parts, choice.listed]).encode()).hexdigest()


def choose(basis: Basis, progress: bool = True) -> Choice:
    """The choice of the least expected cost whose weight files take at most the budget.

    Raises DataError, with the figures, for a budget that is too small, or too large to choose in, and
    for a source that is still to be downloaded.
    """
    source, importance, moments, sensitivity, budget = basis
    stacks = _stacks(source)
    exact = source.exact(next(iter(stacks.values()))[0])
    sizes = _sizes(stacks, exact)
    low = {place: next(iter(each)) for place, each in sizes.items()}
    smallest, largest = (_whole(source, each) for each in (low, dict.fromkeys(sizes, exact)))
    if not smallest <= budget < largest:
        raise DataError(
            f"a budget of {budget:,} bytes leaves nothing to choose: recipe q2 takes {smallest:,} "
            f"bytes, and recipe official, which is exact, {largest:,}"
        )
    if importance is not None:
        importance.check(entry for found in stacks.values() for entry in found)
    if moments is not None:
        moments.check(source)
    encoder = Encoder(source, importance, moments, together=SAMPLE)
    costs = _costs(source, stacks, encoder, sensitivity, progress)
    room = budget - smallest + sum(sizes[place][format] for place, format in low.items())
    while True:  # headers are a few bytes longer or shorter
        choice = Choice(least(costs, sizes, room), costs, budget)
        over = _whole(source, choice.formats) - budget
        if over <= 0:
            return replace(choice, made_from=basis.digest(choice))
        room -= over


def _stacks(source: Source) -> Stacks:
    """The stacks of experts of every place. DataError if any is still to be downloaded."""
    stacks: dict[Place, list[Entry]] = {}
    for entry in (e for entries in source.inventory.values() for e in entries):
        if entry.kind == "experts":
            stacks.setdefault(place_of(entry, source.config), []).append(entry)
            if source.remote(entry):
                raise DataError(
                    f"{source.path}: q2-auto looks at the weights before it chooses; download them "
                    f"first, or give the choice of an earlier conversion"
                )
    return stacks


def _sizes(stacks: Stacks, exact: str) -> Sizes:
    """Bytes of every format at every place."""
    return {
        place: {
            format: sum(OutEntry(each, format, False).nbytes for each in found)
            for format in (*ROUNDED[place[1]], exact)
        }
        for place, found in stacks.items()
    }


def _whole(source: Source, formats: Mapping[Place, str]) -> int:
    """Bytes of all weight files."""
    return Plan(source, "q2-auto", None, choice=Choice(formats, {})).nbytes


def _costs(
    source: Source,
    stacks: Stacks,
    encoder: Encoder,
    sensitivity: Sensitivity,
    progress: bool,
) -> dict[Place, dict[str, float]]:
    """What every format costs at every place."""
    found: dict[Place, dict[str, float]] = {}
    hidden = not (progress and sys.stderr.isatty())
    for place, entries in tqdm(sorted(stacks.items()), "trying formats", disable=hidden):
        main = [entry for entry in entries if entry.name.startswith("layers.")]
        errors = {f: np.mean([error(encoder, e, f) for e in main]) for f in ROUNDED[place[1]]}
        costs = {f: float(sensitivity.nats[place] * each) for f, each in errors.items()}
        found[place] = {**costs, source.exact(main[0]): 0.0}
    return found


def error(encoder: Encoder, entry: Entry, format: str) -> float:
    """The relative square error of a few experts' products; of their weights, if no inputs are known."""
    rows = slice(0, entry.shape[-2])
    each = [encoder.rows(format, entry, n, rows).loss for n in range(min(SAMPLE, experts(entry)))]
    steered = encoder.importance or (encoder.moments and encoder.moments.of(entry, 0))
    return float(np.mean([(loss.weighted if steered else loss.relative) ** 2 for loss in each]))


def least(costs: Mapping[Place, Mapping[str, float]], sizes: Sizes, room: int) -> dict[Place, str]:
    """The formats with the least sum of costs that take at most `room` bytes together.

    By dynamic programming over what is taken beyond the smallest formats, in units that divide all.
    """
    beyond = {p: {f: n - min(each.values()) for f, n in each.items()} for p, each in sizes.items()}
    unit = math.gcd(*(n for each in beyond.values() for n in each.values())) or 1
    units = (room - sum(min(each.values()) for each in sizes.values())) // unit
    assert units >= 0, "the smallest formats fit"
    best, taken = np.zeros(units + 1), {}
    for place in costs:
        steps = {f: n // unit for f, n in beyond[place].items() if n // unit <= units}
        tried = [
            np.concatenate([np.full(n, np.inf), best[: units + 1 - n] + costs[place][f]])
            for f, n in steps.items()
        ]
        taken[place] = [*steps], np.argmin(tried, axis=0)
        best = np.min(tried, axis=0)
    left, formats = units, {}
    for place in reversed([*costs]):
        names, index = taken[place]
        formats[place] = names[index[left]]
        left -= beyond[place][formats[place]] // unit
    return dict(sorted(formats.items()))
