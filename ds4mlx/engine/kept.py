"""A kept state, and how a prompt is to begin with one."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ds4mlx.state.decode_state import DecodeState
from ds4mlx.store.keys import token_array
from ds4mlx.store.policy import Keeper

LOG = logging.getLogger("ds4mlx")


@dataclass(eq=False)
class Kept:
    """A state, and the tokens that it has taken; more of them while it is worked on.

    prompt: how many tokens it is known to take, while it is `busy`. used: when it was, in order.
    """

    tokens: list[int]
    state: DecodeState
    keeper: Keeper | None
    prompt: int = 0
    busy: bool = True
    used: int = 0
    nbytes: int = 0
    _ids: np.ndarray = field(default_factory=lambda: token_array([]))

    def shared(self, ids: np.ndarray) -> int:
        """How many tokens at the beginning of `ids` are the same."""
        if len(self._ids) < len(self.tokens):
            self._ids = np.append(self._ids, token_array(self.tokens[len(self._ids) :]))
        count = min(len(ids), len(self.tokens))
        differing = np.flatnonzero(ids[:count] != self._ids[:count])
        return int(differing[0]) if len(differing) else count

    def save(self, act: Callable[[Keeper], None]) -> None:
        """Have the keeper save something. If that fails, nothing more is saved."""
        if self.keeper is None:
            return
        try:
            act(self.keeper)
        except Exception as error:  # noqa: BLE001 - the answer goes on without
            LOG.warning("KV store: a state is not saved: %s", error)
            self.keeper = None

    def covers(self, other: "Kept") -> bool:
        """Whether the state can go back to all that another one has taken."""
        length = len(other.tokens)
        return (
            length <= self.state.offset
            and self.state.reach(length) == length
            and self.tokens[:length] == other.tokens
        )


@dataclass(frozen=True)
class Plan:
    """How to begin with a prompt: its ids as they are best spelled, and what is there of them.

    length: how many tokens. source: "memory", "store" or "". alike: how many tokens begin some kept
    or stored state, reachable or not. awaited: whose reading up to `until` to wait for.
    """

    ids: list[int]
    length: int = 0
    kept: Kept | None = None
    source: str = ""
    alike: int = 0
    awaited: Kept | None = None
    until: int = 0

    @property
    def must_wait(self) -> bool:
        """Whether what is awaited has not happened yet."""
        kept = self.awaited
        return kept is not None and kept.busy and kept.state.offset < self.until

    @property
    def why(self) -> str:
        """Why no more is reused, as a clause."""
        if self.length == len(self.ids) - 1:
            return "all but the last token"
        if self.alike > self.length:
            return f"{self.alike} are alike, and {self.length} is the nearest boundary below"
        return "nothing that is kept begins alike for longer"
