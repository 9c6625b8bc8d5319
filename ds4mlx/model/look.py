"""What the core attention shows of its queries: what each sees, chooses and weighs, row by row.

Raw rows are shown by their distance from the query, however many of them were read together: the last
of W columns is the query's own row, the first the one W - 1 tokens before.
"""

from collections.abc import Callable

import mlx.core as mx

from ds4mlx.model.batch import Span
from ds4mlx.model.taps import ATTENDED, inside, tap

SHARES = tuple(name for name in ATTENDED if name.startswith("weights."))


class Look:
    """Queries start..stop-1 of a span, in the layer whose attention's names begin with `site`.

    Where nobody wants a quantity, nothing is added to the graph. `wide`: rows of the window.
    """

    def __init__(self, site: str, span: Span, wide: int, start: int, stop: int):
        self._site, self._span, self._wide = site, span, wide
        offset = span.step.offset
        self._first = max(0, offset + start - wide + 1)  # position of the first raw row
        self._low, self._high = offset + start, offset + stop
        self._wants = inside(site, *SHARES) is not None

    @property
    def weights(self) -> Callable[[list[mx.array]], list[mx.array]] | None:
        """What `sink_attention` is to pass weights through, if anybody wants them."""
        return self._shares if self._wants else None

    def window(self, mask: mx.array) -> mx.array:
        """Which raw rows each query sees, bool (L, K): the mask, or what is put in its place."""
        if inside(self._site, "weights.positions", "window_visible", "weights.window") is not None:
            self._tap("weights.positions", self._positions())
        if inside(self._site, "window_visible") is None:
            return mask
        seen = self._tap("window_visible", self._by_distance(mask))
        return self._by_place(seen, mask.shape[-1]) & mask

    def nothing(self, heads: int, topk: int | None) -> None:
        """There is no compressed row yet. `topk`: how many the indexer chooses, if there is one."""
        count = self._high - self._low
        self._tap("visible", mx.zeros((count, 0), mx.bool_))
        if topk is not None:
            self._tap("indexer.scores", mx.zeros((count, 0)))
            self._tap("indexer.chosen", mx.full((count, topk), -1, mx.int32))
        self._tap("weights.rows", mx.zeros((count, 0), mx.int32))
        self._tap("weights.compressed", mx.zeros((count, heads, 0)))

    def scores(self, scores: mx.array, visible: mx.array) -> mx.array:
        """The indexer's scores (L, R), those of invisible rows -inf where anybody wants them."""
        if inside(self._site, "indexer.scores") is None:
            return scores
        return self._tap("indexer.scores", mx.where(visible, scores, -mx.inf))

    def all_rows(self, visible: mx.array) -> None:
        """Each query sees the compressed rows that are visible to it, bool (L, R)."""
        if self._wants:
            self._tap("weights.rows", numbered(visible))

    def kept(self, visible: mx.array, topk: int) -> mx.array:
        """The same, with the choice shown as one of `topk` rows; what is visible (L, R) after it."""
        if inside(self._site, "indexer.chosen") is None:
            return visible
        rows = numbered(visible)
        rows = mx.pad(rows, [(0, 0), (0, topk - rows.shape[-1])], constant_values=-1)
        chosen = self._tap("indexer.chosen", rows)
        return visible & (chosen[..., None] == mx.arange(visible.shape[-1])).any(1)

    def chosen(
        self, chosen: mx.array, mask: mx.array, visible: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The choice int (L, topk) and which of it is visible; out of bool (L, R)."""
        if inside(self._site, "indexer.chosen") is not None:
            named = self._tap("indexer.chosen", mx.where(mask, chosen.astype(mx.int32), -1))
            chosen = mx.clip(named, 0, visible.shape[-1] - 1)
            mask = mx.take_along_axis(visible, chosen, axis=-1) & (named == chosen)
        if self._wants:
            self._tap("weights.rows", mx.where(mask, chosen.astype(mx.int32), -1))
        return chosen, mask

    def _shares(self, parts: list[mx.array]) -> list[mx.array]:
        """The weights (L, H, K) of window, compressed rows if there are any, and sink."""
        window, *compressed, sink = parts
        if inside(self._site, "weights.window") is not None:
            shown = self._tap("weights.window", self._by_distance(window))
            window = self._by_place(shown, window.shape[-1])
        compressed = [self._tap("weights.compressed", part) for part in compressed]
        return [window, *compressed, self._tap("weights.sink", sink[..., 0])[..., None]]

    def _positions(self) -> mx.array:
        """Positions of the raw rows by distance, int (L, W), -1 before the first token."""
        positions = self._queries() - self._wide + 1 + mx.arange(self._wide)
        return mx.maximum(positions, -1).astype(mx.int32)

    def _queries(self) -> mx.array:
        return mx.arange(self._low, self._high)[:, None]

    def _by_distance(self, shown: mx.array) -> mx.array:
        """Of each raw row that was read, (L, ..., K), to one by distance, (L, ..., W)."""
        places = self._queries() - self._wide + 1 + mx.arange(self._wide) - self._first
        return _picked(shown, places)

    def _by_place(self, shown: mx.array, count: int) -> mx.array:
        """And back, to `count` rows that were read."""
        places = self._first + mx.arange(count) - self._queries() + self._wide - 1
        return _picked(shown, places)

    def _tap(self, name: str, value: mx.array) -> mx.array:
        return tap(self._site, name, value, self._span)


def numbered(visible: mx.array) -> mx.array:
    """The numbers of visible rows, int (L, R), -1 in place of others."""
    return mx.where(visible, mx.arange(visible.shape[-1]), -1).astype(mx.int32)


def _picked(shown: mx.array, places: mx.array) -> mx.array:
    """shown (L, ..., K) at places int (L, n): (L, ..., n), nothing where there is no such place."""
    inside_ = (places >= 0) & (places < shown.shape[-1])
    places = mx.clip(places, 0, shown.shape[-1] - 1)
    if shown.ndim == 3:
        inside_, places = inside_[:, None], places[:, None]
    places = mx.broadcast_to(places, (*shown.shape[:-1], places.shape[-1]))
    picked = mx.take_along_axis(shown, places, axis=-1)
    return mx.where(inside_, picked, mx.zeros_like(picked))
