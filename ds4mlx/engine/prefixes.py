"""States that are kept because a prompt may begin as they do, in memory and in a store.

A state is one conversation. Who shares only a beginning of it gets a copy that goes back to there,
which costs nothing before either is written to. Nobody reads what another one is about to have read:
a prompt waits until the other has come to where they part.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from ds4mlx.chat.tokens import USER
from ds4mlx.engine.respelling import respelled
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.store import KVStore
from ds4mlx.store.keys import token_array
from ds4mlx.store.policy import Keeper, Policy
from ds4mlx.store.texts import token_texts
from ds4mlx.text.tokenizer import Tokenizer

# Tokens that must be to gain for a prompt to wait until another one has been read.
WORTH_WAITING = 64
# Boundaries kept of a state beside its regular ones.
MOST_POINTS = 6


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
        return "what is kept goes on otherwise" if self.length else "nothing is kept of it"


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

    # From a prompt to a state

    def plan(self, ids: list[int]) -> Plan:
        """How to begin with a prompt, spelled so that most of it is there."""
        spellings = [ids, *self._respelled(ids)]
        if self.store is not None and self.store.tokenizer is not None:
            spellings.append(self.store.respelled(ids))
        plans = [self._plan(spelled) for spelled in spellings]
        return max(plans, key=lambda plan: max(plan.length, plan.until))

    def begin(self, plan: Plan, room: int) -> DecodeState:
        """A state of the first `plan.length` tokens, for one to work on.

        room: bytes that may stay beside it; a kept state that is larger is not copied but taken.
        """
        if plan.source == "store" and self.store is not None:
            state, length = self.store.restore(plan.ids[:-1])
            if length:
                return state
            plan = self._plan(plan.ids, stored=False)  # the file is gone, or damaged
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
        keeper = None
        for point in self._points(tokens):
            if point > state.offset:
                state.add_boundary(point)
        points = sorted(p for p in state.records if p % state.boundaries.spacing.dense)
        for point in points[1 : -MOST_POINTS + 1]:
            state.drop_boundary(point)
        if self.store is not None:
            keeper = Keeper(self.store, tokens, state, self._policy)
        kept = Kept(tokens, state, keeper, len(tokens))
        self._touch(kept)
        self.kept.append(kept)
        return kept

    def rest(self, kept: Kept) -> None:
        """Nobody works on a state any more. One that cannot be computed is dropped."""
        state = kept.state
        kept.tokens, kept.busy = kept.tokens[: state.offset], False
        self._touch(kept)
        try:
            mx.eval(state.arrays)
            kept.nbytes = state.nbytes
        except Exception:  # noqa: BLE001 - the device says why elsewhere
            state.rewind(0)
        if not state.offset:
            self.kept.remove(kept)

    # Leaving memory

    def shrink(self, most: int) -> None:
        """Have the resting states take at most so many bytes: save and drop the oldest."""
        total = self.nbytes
        for kept in sorted(self.kept, key=lambda kept: kept.used):
            if total <= most:
                return
            if not kept.busy:
                self._save(kept, "evict")
                self.kept.remove(kept)
                total -= kept.nbytes
                mx.clear_cache()

    def save_all(self, until: float) -> None:
        """Save the resting states, the newest first, and wait for the disk; until that time."""
        for kept in sorted(self.kept, key=lambda kept: -kept.used):
            if time.monotonic() < until:
                self._save(kept, "shutdown")
        if self.store is not None:
            self.store.flush()

    def _save(self, kept: Kept, reason: str) -> None:
        if kept.keeper is not None:
            kept.keeper.leave(reason)

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
        if stored and self.store is not None:
            length = self.store.longest(most)
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

    def _pieces(self, tokens: Sequence[int]) -> list[bytes]:
        return self._texts(token_array(tokens))

    def _points(self, ids: list[int]) -> set[int]:
        """Where prompts that begin alike are likely to part: behind the system text, at the last
        question, and at the end."""
        questions = np.flatnonzero(token_array(ids) == self._user) + 1 if self._user else []
        ends = [int(questions[0]), int(questions[-1])] if len(questions) else []
        return {point for point in (*ends, len(ids) - 1) if point > 0}
