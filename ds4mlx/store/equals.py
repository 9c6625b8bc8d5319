"""Whether stored segments hold the very rows of a state that did not come from the store.

Runs with other chunk boundaries give rows that differ in their last bits, so the tokens alone do not
tell; rows of two runs are never mixed.
"""

from collections.abc import Callable

import numpy as np

from ds4mlx.state.decode_state import DecodeState
from ds4mlx.store import restoring
from ds4mlx.store.catalogue import Catalogue
from ds4mlx.store.items import Segment
from ds4mlx.store.state_bytes import parts

# Fewer tokens in common are not worth a branch of their own.
LEAST_SHARED = 128
# Segments whose rows are read to compare, for one piece of a chain.
TRIED = 2

KeyOf = Callable[[np.ndarray, list[np.ndarray], str, int, int], str]


class Equals:
    """Compares; remembers the token ids of the segments it has seen."""

    def __init__(self, catalogue: Catalogue, key_of: KeyOf):
        self.catalogue, self.key_of = catalogue, key_of
        self._ids: dict[str, np.ndarray] = {}

    def best(
        self, followers: list[Segment], tokens: np.ndarray, state: DecodeState
    ) -> tuple[str, int] | None:
        """Of segments that could follow: the one that shares most, and to which length; or None."""
        common = {segment.key: self.common(segment, tokens) for segment in followers}
        ranked = sorted(followers, key=lambda s: (common[s.key], s.created), reverse=True)
        for segment in ranked[:TRIED]:
            end = self._checked(segment, common[segment.key], tokens, state)
            if end == segment.end or end - segment.start >= LEAST_SHARED:
                return segment.key, end
        return None

    def common(self, segment: Segment, tokens: np.ndarray) -> int:
        """The length up to which a segment has these tokens; its start if it cannot be read."""
        ids = self._ids.get(segment.key)
        if ids is None:
            ids = restoring.read_ids(self.catalogue, segment)
            if ids is None:
                return segment.start
            self._ids[segment.key] = ids
        count = min(len(ids), len(tokens) - segment.start)
        wrong = np.flatnonzero(ids[:count] != tokens[segment.start : segment.start + count])
        return segment.start + (int(wrong[0]) if len(wrong) else count)

    def _checked(self, segment: Segment, end: int, tokens: np.ndarray, state: DecodeState) -> int:
        """The length up to which it has the state's rows too, at most `end`."""
        start, compressors = segment.start, parts(state)
        if end == segment.end:  # the checksums stand in its key, so it need not be read
            rows = [part.view(start, end) for part in compressors]
            if self.key_of(tokens, rows, segment.parent, start, end) == segment.key:
                return end
        if end - start < LEAST_SHARED:
            return start
        stored = restoring.read_rows(self.catalogue, segment, compressors)
        for part, block in zip(compressors, stored or [], strict=bool(stored)):
            ours = part.view(start, end)
            width = part.form.elements * part.form.dtype.size
            same = (block[: ours.nbytes] == ours).reshape(-1, width).all(axis=1)
            first_wrong = len(same) if same.all() else int(np.argmin(same))
            if first_wrong < len(same):
                end = min(end, (start // part.ratio + first_wrong + 1) * part.ratio - 1)
        return max(start, end) if stored else start
