"""States that are kept because a prompt may begin as they do, in memory and in a store.

A state is one conversation. Who shares only a beginning of it gets a copy that goes back to there,
which costs nothing before either is written to. Nobody reads what another one is about to have read:
a prompt waits until the other has come to where they part.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ds4mlx.chat.tokens import USER
from ds4mlx.engine.kept import Kept, Plan
from ds4mlx.engine.respelling import respelled
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.store import KVStore
from ds4mlx.store.keys import token_array
from ds4mlx.store.policy import Keeper, Policy
from ds4mlx.store.texts import token_texts
from ds4mlx.text.tokenizer import Tokenizer

LOG = logging.getLogger("ds4mlx")

# Tokens that must be to gain for a prompt to wait until another one has been read.
WORTH_WAITING = 64
# Boundaries kept of a state beside its regular ones.
MOST_POINTS = 6


class Prefixes:
    """All kept states of one model, and the store behind them."""

    def __init__(self, model: Model, tokenizer: Tokenizer, store: KVStore | None):
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.kept: list[Kept] = []
        self._policy, self._clock = Policy(), 0
        self._texts = token_texts(tokenizer)
        self._user = tokenizer.encoder.token_to_id(USER)

    @property
    def nbytes(self) -> int:
        """Bytes of the states that nobody works on."""
        return sum(kept.nbytes for kept in self.kept if not kept.busy)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the files in the store's directory."""
        with _passed_over():
            return self.store.nbytes if self.store is not None else 0
        return 0

    # From a prompt to a state

    def plan(self, ids: list[int]) -> Plan:
        """How to begin with a prompt, spelled so that most of it is there."""
        spellings = [ids, *self._respelled(ids), *self._respelled_by_store(ids)]
        plans = [self._plan(spelled) for spelled in spellings]
        return max(plans, key=lambda plan: max(plan.length, plan.until))

    def begin(self, plan: Plan, room: int) -> DecodeState:
        """A state of the first `plan.length` tokens, for one to work on.

        room: bytes that may stay beside it; a kept state that is larger is not copied but taken.
        """
        if plan.source == "store":
            state = self._restored(plan.ids)
            if state is not None:
                return state
            plan = self._plan(plan.ids, stored=False)
        kept = plan.kept
        if kept is None:
            return self.model.make_cache()
        self._touch(kept)
        if kept.busy or (plan.length < kept.state.offset and kept.nbytes <= room):
            state = self.model.make_cache()
            state.share(kept.state)
        else:
            if plan.length < kept.state.offset:
                self._save(kept, "evict")
            self.kept.remove(kept)
            state = kept.state
        state.rewind(plan.length)
        state.boundaries.asked = frozenset()
        return state

    def work_on(self, tokens: list[int], state: DecodeState) -> Kept:
        """Keep a state that begins to take a prompt; whoever drives it appends to the tokens."""
        for point in self._points(tokens):
            if point > state.offset:
                state.add_boundary(point)
        points = sorted(p for p in state.records if p % state.boundaries.spacing.dense)
        for point in points[1 : -MOST_POINTS + 1]:
            state.drop_boundary(point)
        keeper = None
        if self.store is not None:
            keeper = Keeper(self.store, tokens, state, self._policy)
        kept = Kept(tokens, state, keeper, len(tokens))
        self._touch(kept)
        self.kept.append(kept)
        return kept

    def rest(self, kept: Kept) -> None:
        """Nobody works on a state any more.

        One that cannot be computed is dropped, and so are those that this one can go back to.
        """
        state = kept.state
        kept.tokens, kept.busy = kept.tokens[: state.offset], False
        self._touch(kept)
        try:
            mx.eval(state.arrays)
            kept.nbytes = state.nbytes
        except Exception:  # noqa: BLE001 - the device says why elsewhere
            state.rewind(0)
        if not state.offset:
            self._drop(kept)
            return
        others = [other for other in self.kept if other is not kept and not other.busy]
        for other in filter(kept.covers, others):
            self._drop(other)

    # Leaving memory

    def shrink(self, most: int, spared: Kept | None = None) -> None:
        """Have the resting states take at most so many bytes: save and drop the oldest."""
        total = self.nbytes
        for kept in sorted(self.kept, key=lambda kept: kept.used):
            if total <= most:
                return
            if not kept.busy and kept is not spared:
                self._save(kept, "evict")
                self._drop(kept)
                total -= kept.nbytes
                mx.clear_cache()

    def save_all(self, until: float) -> None:
        """Save the resting states, the newest first, and wait for the disk; until that time."""
        for kept in sorted(self.kept, key=lambda kept: -kept.used):
            if time.monotonic() < until:
                self._save(kept, "shutdown")
        if self.store is not None:
            self.store.flush()

    def give_up(self, state: DecodeState) -> None:
        """Free the memory of a state at once, not only when Python finds that it is not used."""
        state.share(self.model.make_cache())

    def _drop(self, kept: Kept) -> None:
        self.kept.remove(kept)
        self.give_up(kept.state)

    def _save(self, kept: Kept, reason: str) -> None:
        kept.save(lambda keeper: keeper.leave(reason))

    def _touch(self, kept: Kept) -> None:
        self._clock += 1
        kept.used = self._clock

    def _plan(self, ids: list[int], stored: bool = True) -> Plan:
        """How to begin with exactly these ids."""
        most, plan, awaited, until = token_array(ids[:-1]), Plan(ids), None, 0
        for kept in self.kept:
            shared = kept.shared(most)
            length = kept.state.reach(min(shared, kept.state.offset))
            plan = replace(plan, alike=max(plan.alike, shared))
            if length > plan.length:
                plan = replace(plan, length=length, kept=kept, source="memory")
            if kept.busy and kept.state.offset < min(shared, kept.prompt) and shared > until:
                awaited, until = kept, min(shared, kept.prompt)
        length = self._stored(most) if stored else 0
        if length > plan.length:
            alike = max(plan.alike, length)
            plan = replace(plan, length=length, kept=None, source="store", alike=alike)
        if awaited is not None and until >= plan.length + WORTH_WAITING:
            return replace(plan, awaited=awaited, until=until)
        return plan

    def _respelled(self, ids: list[int]) -> Iterator[list[int]]:
        """The prompt as each kept state that says the same for longer has spelled it."""
        most = token_array(ids[:-1])
        for kept in self.kept:
            shared = kept.shared(most)
            if shared < len(most):
                tokens = kept.tokens if kept.busy else kept.tokens[: kept.state.offset]
                spelled = respelled(self.tokenizer, self._pieces, tokens, ids, shared)
                if spelled is not None:
                    yield spelled

    # The store, without which everything goes on

    def _stored(self, ids: np.ndarray) -> int:
        """Length of the longest stored prefix."""
        with _passed_over():
            return self.store.longest(ids) if self.store is not None else 0
        return 0

    def _restored(self, ids: list[int]) -> DecodeState | None:
        """The state of the longest stored prefix; None if it has gone meanwhile."""
        with _passed_over():
            state, length = self.store.restore(ids[:-1]) if self.store is not None else (None, 0)
            return state if length else None
        return None

    def _respelled_by_store(self, ids: list[int]) -> Iterator[list[int]]:
        """The prompt as a stored prefix that says the same has spelled it."""
        if self.store is not None and self.store.tokenizer is not None:
            with _passed_over():
                yield self.store.respelled(ids)

    def _pieces(self, tokens: Sequence[int]) -> list[bytes]:
        return self._texts(token_array(tokens))

    def _points(self, ids: list[int]) -> set[int]:
        """Where prompts that begin alike are likely to part: behind the system text, at the last
        question, and at the end."""
        questions = np.flatnonzero(token_array(ids) == self._user) + 1 if self._user else []
        ends = [int(questions[0]), int(questions[-1])] if len(questions) else []
        return {point for point in (*ends, len(ids) - 1) if point > 0}


@contextlib.contextmanager
def _passed_over() -> Iterator[None]:
    """A store that cannot be read holds nothing."""
    try:
        yield
    except (DataError, OSError) as error:
        LOG.warning("KV store: %s; it is passed over", error)
