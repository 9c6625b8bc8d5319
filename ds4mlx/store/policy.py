"""When `generate`, `chat` and `serve` save, and what; `KVStore.save` itself knows none of this."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from ds4mlx.errors import DataError
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.store.kv_store import KVStore

LOG = logging.getLogger("ds4mlx")


@dataclass(frozen=True)
class Policy:
    """Lengths at which prefixes are saved, in tokens.

    A prompt's last `trim` tokens are left out, as they may be tokenised otherwise when the prompt
    grows; shorter prefixes than `min_tokens` are not worth a file; lengths are multiples of
    `align`, where a boundary record is smallest; a long run is saved every `interval`.
    """

    min_tokens: int = 512
    trim: int = 32
    align: int = 128
    interval: int = 10240

    def prompt_end(self, tokens: int) -> int:
        """Where a prompt of so many tokens is saved; 0 for nowhere."""
        return self.aligned(tokens - self.trim)

    def aligned(self, tokens: int) -> int:
        """The longest prefix to save of so many tokens; 0 for none."""
        length = tokens // self.align * self.align
        return length if length >= self.min_tokens else 0


class Keeper:
    """Makes the policy's saves of one state while it takes a prompt and goes on.

    tokens: those that the state holds, then the prompt; whoever drives the state appends to them.
    A failure to save is told once and ends the saving, never the generation.
    """

    def __init__(self, store: KVStore, tokens: list[int], cache: DecodeState, policy: Policy):
        self.store, self.tokens, self.cache, self.policy = store, tokens, cache, policy
        self.failed = False
        self._target = policy.prompt_end(len(tokens))
        self._reason = "continue" if cache.offset else "cold"
        self._next = self._following(cache.offset)
        if self._target > cache.offset:
            cache.add_boundary(self._target)
        else:
            self._target = 0

    def advanced(self) -> None:
        """The state has moved on: save what has come due."""
        if self.cache.offset >= self._next:
            due = self.cache.offset // self.policy.interval * self.policy.interval
            self._save(due, "continue")
            self._next = self._following(self.cache.offset)
        if self._target and self.cache.offset >= self._target:
            self._save(self._target, self._reason)
            self.cache.drop_boundary(self._target)
            self._target = 0

    def end(self, reason: str) -> None:
        """The state is given up: save as much as the policy allows, and wait for the disk."""
        self.leave(reason)
        self.store.flush()

    def leave(self, reason: str) -> None:
        """Save as much of the state as the policy allows; it is written beside what follows."""
        length = self.cache.reach(self.policy.aligned(self.cache.offset))
        if length >= self.policy.min_tokens:
            self._save(length, reason)

    def _following(self, tokens: int) -> int:
        return (tokens // self.policy.interval + 1) * self.policy.interval

    def _save(self, length: int, reason: str) -> None:
        stored = self.cache.stored
        if self.failed or (stored is not None and stored.tokens >= length and reason != "cold"):
            return
        self._try(lambda: self.store.save_soon(self.tokens[:length], self.cache, reason))

    def _try(self, save: "Callable[[], Future[str]]") -> None:
        try:
            save().add_done_callback(self._told)
        except DataError as error:
            self._tell(error)

    def _told(self, future: "Future[str]") -> None:
        error = future.exception()
        if error is not None:
            self._tell(error)

    def _tell(self, error: BaseException) -> None:
        if not self.failed:
            LOG.warning("KV store: %s; nothing more is saved", error)
        self.failed = True


def take_up(
    store: KVStore, ids: list[int], cache: DecodeState, shared: int
) -> tuple[DecodeState, int]:
    """The state that shares most with a prompt `ids`: a stored one, or `cache`.

    That shares the first `shared` tokens. Returns the state and how many tokens it shares.

    At least the last token of the prompt is left to be fed.
    """
    if store.longest(ids[:-1]) <= shared:
        return cache, shared
    state, count = store.restore(ids[:-1])
    return (state, count) if count > shared else (cache, shared)
