"""Which files go when the store is full, and which boundary records are thinned out.

Leaves go first: segments that no other follows, with their boundary records. The lowest of
(1 + hits) x prefill saved / bytes goes first, where all of the first factor halves every 6 hours and
the prefill saved is the segment's own tokens, each at the cost of its depth. What somebody has in
use, and the chain that is being saved, stays.
"""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ds4mlx.errors import DataError
from ds4mlx.state.boundaries import Spacing
from ds4mlx.store.catalogue import HALF_LIFE, Catalogue
from ds4mlx.store.items import Record, Segment
from ds4mlx.store.locks import Claim

# Tokens after which attention costs as much again as the rest of a token's prefill.
COST_DEPTH = 100_000
# Bytes of a chain's boundary records up to which none is thinned out, unless told.
RECORDS_BYTES = 64_000_000


class StoreFull(DataError):
    """What is to be saved does not fit: the budget or the disk is too small."""


@dataclass(frozen=True)
class Leaf:
    """A segment that no other follows, its records, and the claim under which they may go."""

    segment: Segment
    records: list[Record]
    claim: Claim


def plan(catalogue: Catalogue, wanted: int, kept: Iterable[str] = ()) -> list[Leaf]:
    """Leaves to delete, in this order, for `wanted` bytes to become free; StoreFull if they cannot.

    kept: keys of segments that stay. Needs the right to write. Every leaf is claimed, so that nobody
    can take it up any more: give all of them to `evict`, or close the claims.
    """
    chosen: list[Leaf] = []
    try:
        _choose(catalogue, wanted, set(kept), chosen)
    except BaseException:
        for leaf in chosen:
            leaf.claim.close()
        raise
    return chosen


def _choose(catalogue: Catalogue, wanted: int, kept: set[str], chosen: list[Leaf]) -> None:
    """Append leaves, claimed, until `wanted` bytes would become free."""
    records: dict[str, list[Record]] = defaultdict(list)
    children: dict[str, int] = defaultdict(int)
    for record in catalogue.records.values():
        records[record.segment].append(record)
    for segment in catalogue.segments.values():
        children[segment.parent] += 1
    now, freed = time.time(), 0
    leaves = {s.key: s for s in catalogue.segments.values() if not children[s.key]}
    while freed < wanted:
        free = [s for s in leaves.values() if s.key not in kept]
        if not free:
            raise StoreFull(f"only {freed:,} of {wanted:,} bytes can be made free in the KV store")
        leaf = min(free, key=lambda s: (worth(catalogue, s, records[s.key], now), s.created))
        claim = Claim.take(catalogue.path(leaf))
        if claim is None:
            kept.add(leaf.key)
            continue
        del leaves[leaf.key]
        chosen.append(Leaf(leaf, records[leaf.key], claim))
        freed += leaf.nbytes + sum(record.nbytes for record in records[leaf.key])
        children[leaf.parent] -= 1
        if leaf.parent in catalogue.segments and not children[leaf.parent]:
            leaves[leaf.parent] = catalogue.segments[leaf.parent]


def worth(catalogue: Catalogue, segment: Segment, records: list[Record], now: float) -> float:
    """Decayed hits x prefill saved / bytes of a leaf."""
    hits = sum(catalogue.uses[r.key].decayed(now) for r in records if r.key in catalogue.uses)
    newest = max([segment.created, *(r.created for r in records)])
    age = 0.5 ** (max(0.0, now - newest) / HALF_LIFE)
    tokens = segment.end - segment.start
    saved = tokens * (1 + (segment.start + segment.end) / 2 / COST_DEPTH)
    value = (age + hits) * saved / (segment.nbytes + sum(r.nbytes for r in records))
    return float(f"{value:.2e}")  # equals must not differ by the length of a header


def evict(catalogue: Catalogue, chosen: Iterable[Leaf]) -> int:
    """Delete leaves, records before their segment; the bytes that came free."""
    freed, chosen = 0, list(chosen)
    try:
        for leaf in chosen:
            for item in (*leaf.records, leaf.segment):
                catalogue.remove(item)
                freed += item.nbytes
    finally:
        for leaf in chosen:
            leaf.claim.close()
    return freed


def superfluous(catalogue: Catalogue, segment: str, spacing: Spacing, allowed: int) -> list[Record]:
    """Records on a chain that may go, oldest first: beyond `allowed` bytes, and needed by no leaf."""
    oldest_first = sorted(catalogue.on_chain(segment), key=lambda record: record.created)
    excess = sum(record.nbytes for record in oldest_first) - allowed
    if excess <= 0:
        return []
    needed: set[str] = set()
    parents = {other.parent for other in catalogue.segments.values()}
    for leaf in catalogue.segments.values():
        if leaf.key not in parents or leaf.key == segment:
            along = list(catalogue.on_chain(leaf.key))
            kept = spacing.thinned({r.tokens for r in along}, leaf.end)
            needed |= {r.key for r in along if r.tokens in kept}
    chosen = []
    for record in oldest_first:
        if excess > 0 and record.key not in needed:
            chosen.append(record)
            excess -= record.nbytes
    return chosen
