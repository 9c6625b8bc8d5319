"""A sequence that goes on by drafts: some tokens are proposed, and one call of the model checks them.

A round proposes up to 3 tokens by the draft block, feeds them after the last token, and draws from
the logits after each. Where a draw is the token proposed, the next one counts too. The state takes the
tokens one by one, as they are asked for: between two calls it is exactly that of the tokens given out
but the last, as in `decoding`, whatever is done with it then, and what is not wanted is left out.

What comes out is what comes out without drafts: see `proposals`. Where drafts do not pay, the
sequence goes on without, a token at a time, as `bypass` says. A round stays before the next boundary,
so that records are those of the tokens given out.
"""

import time
from collections import deque
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ds4mlx.engine.ahead import Ahead, Seen, stepped_back
from ds4mlx.engine.bypass import Bypass
from ds4mlx.engine.decoding import Decoding, Taken
from ds4mlx.engine.drafter import Drafter
from ds4mlx.engine.interrupts import undivided
from ds4mlx.engine.proposals import Proposal
from ds4mlx.engine.requests import check_count
from ds4mlx.engine.sampling import Sampler
from ds4mlx.engine.sequence import NOT_FINITE, Sequence
from ds4mlx.engine.step import go_back, not_finite, rows_of
from ds4mlx.engine.undone import undone_on_failure
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.model.taps import steady

# Most tokens proposed in a round.
MOST_DRAFTS = 3


def check_drafts(model: Model, drafts: int) -> None:
    """Raises DataError unless a model can propose so many tokens; 0 is none at all."""
    check_count("drafts", drafts, end=MOST_DRAFTS + 1)
    if drafts and not model.mtp:
        raise DataError("this model has no draft block (MTP), so it cannot propose tokens")


@dataclass
class Drafted:
    """How many tokens were proposed in how many rounds, and how many of them were accepted."""

    rounds: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclass
class _Checked:
    """A place after which the next token may be drawn: logits (1, vocab) and streams (1, 1, n, D).

    token: int32 (1,), None where it is drawn when those before it are taken. proposal: what it may
    be, and that token. before: the state's length before the step to here. ahead: that step.
    """

    token: mx.array | None
    logits: mx.array
    streams: mx.array
    before: int
    proposal: Proposal | None
    proposed: int | None
    ahead: Ahead | None


class Speculation:
    """One sequence of a model, driven as by `Decoding`, up to `drafts` tokens a round.

    bypass: what decides when drafts are used; None uses them always. `drafted` counts.
    """

    def __init__(self, model: Model, sequence: Sequence, drafts: int, bypass: Bypass | None):
        check_drafts(model, drafts)
        self.model, self.sequence, self.drafts = model, sequence, drafts
        self.drafted = Drafted()
        self._bypass, self._seen = bypass, Seen(model)
        self._drafter = Drafter(model, sequence)
        self._plain = Decoding(model, streams=True)
        self._checked: deque[_Checked] = deque()
        self._spent, self._given = 0.0, 0

    def saw(self, streams: mx.array) -> None:
        """Take notice of the streams (1, L, n, D) of tokens that the state has just taken."""
        self._drafter.saw(streams)

    def add(self, logits: mx.array, before: int) -> None:
        """Go on from the logits (1, vocab) after all tokens, as `Decoding.add` says."""
        self._plain.add(self.sequence, logits, before)

    def step(self) -> Taken:
        """The next token, which the sequence has taken. Ctrl-C comes when all is done."""
        begun = time.perf_counter()
        with undivided():
            taken = self._step()
        self._spent += time.perf_counter() - begun
        self._given += 1
        if not self._checked:
            if self._bypass is not None:
                self._bypass.took(self._given, self._spent)
            self._spent, self._given = 0.0, 0
        return taken

    def _step(self) -> Taken:
        if self._checked and not self._goes_on():
            self._checked.clear()
        if not self._checked:
            undrawn = not self.sequence.pending  # from the logits given to `add`
            if undrawn or not steady() or not self._drafting:
                return self._without_drafts()
            self._plain.remove(self.sequence)
            self._round()
        return self._take(self._checked.popleft())

    @property
    def _drafting(self) -> bool:
        return self._bypass is None or self._bypass.drafting

    def _without_drafts(self) -> Taken:
        if not self._plain:
            self._plain.add(self.sequence)
        (taken,) = self._plain.step()
        if taken.streams is not None and taken.error is None:
            self._drafter.saw(taken.streams[:, None])
        return taken

    def _goes_on(self) -> bool:
        """Have the state take the token given out last, if the check of it still holds; whether."""
        if not self._seen.same():
            return False
        ahead = self._checked[0].ahead
        return ahead is not None and ahead.take()

    def _round(self) -> None:
        """Propose tokens and check them; the state then is the one after the token given out last."""
        if not self._seen.same():
            self._seen = Seen(self.model)
            self._drafter.forget()
        state = self.sequence.state
        try:
            with undone_on_failure([state]):
                self._check(self._drafter.propose(self._most(), self._alone))
        except BaseException:
            self._drafter.forget()
            raise

    def _check(self, proposals: list[Proposal]) -> None:
        """Feed the last token and those proposed, and draw after each."""
        sequence, state, pending = self.sequence, self.sequence.state, self.sequence.pending
        tokens = [int(token) for each in proposals for token in np.array(each.token)]
        before, end = state.offset, state.offset + len(pending)
        streams = self.model.streams(mx.array([pending + tokens]), state)
        rows = rows_of(self.model.logits(streams[0, len(pending) - 1 :]))
        offered = [*proposals, None]
        draws = [
            None if sequence.waits else sequence.draw(row, number, each)
            for number, (row, each) in enumerate(zip(rows, offered, strict=True))
        ]
        mx.eval(rows, streams, [draw for draw in draws if draw is not None])
        aheads = stepped_back(state, end)
        own = mx.split(streams[:, len(pending) :], len(tokens), axis=1) if tokens else []
        self._checked = deque(
            map(
                _Checked,
                draws,
                rows,
                [streams[:, : len(pending)], *own],
                [before, *range(end, end + len(tokens))],
                offered,
                [*tokens, None],
                [None, *reversed(aheads)],
            )
        )
        self.drafted.rounds += 1

    def _take(self, checked: _Checked) -> Taken:
        """The token after a place which the state has reached."""
        sequence, state = self.sequence, self.sequence.state
        self._drafter.saw(checked.streams)
        try:
            token = self._drawn(checked)
        except DataError as error:
            self._checked.clear()
            go_back(state, max(checked.before, state.offset - 1))
            return Taken(sequence, NOT_FINITE, "", checked.logits, error)
        if token == NOT_FINITE:
            end = state.offset
            self._checked.clear()
            go_back(state, checked.before)
            failed = Taken(sequence, token, "", checked.logits)
            return replace(failed, error=not_finite(self.model, sequence, end))
        text = sequence.take(token)
        if checked.proposed is not None:
            self.drafted.proposed += 1
            self.drafted.accepted += token == checked.proposed
        if sequence.reason or token != checked.proposed:
            self._checked.clear()
        return Taken(sequence, token, text, checked.logits)

    def _drawn(self, checked: _Checked) -> int:
        token = checked.token
        if token is None or self.sequence.waits:
            token = self.sequence.draw(checked.logits, proposal=checked.proposal)
        return int(np.array(token)[0])

    @property
    def _alone(self) -> bool:
        """Whether proposals are drawn by themselves: where nobody asked for draws that repeat."""
        sampler = self.sequence.sampler
        random = isinstance(sampler, Sampler) and sampler.temperature > 0 and sampler.seed is None
        return random and not self.sequence.waits

    def _most(self) -> int:
        """Tokens to propose: no more than may follow, and none beyond the next boundary."""
        sequence, state = self.sequence, self.sequence.state
        most = min(self.drafts, sequence.max_tokens - sequence.drawn - 1)
        end = state.offset + len(sequence.pending)
        passed = state.boundaries.passed(state.offset, end + most)
        return most if not passed else max(0, passed[0] - 1 - end)
