"""Sequences that go on together, a token each at a time, with one step always submitted ahead.

A drawn token is fed to the next step before it is read, so the device computes that step while the
host reads the token, shows it and builds the step after. A state does not show the step ahead until
its token is asked for: between two calls each state is exactly that of its sequence's tokens but the
last, whatever is done with it then. A step ahead that is not wanted, because the sequence has ended,
was removed, or its state or the model was changed, is dropped. While anybody listens to the model's
quantities, who wants to hear the tokens one by one, nothing is submitted ahead.

Where a draw depends on the token before it, by a rule or a penalty, the step ahead is submitted all
the same, and only its draw waits until that token is read.

Every sequence has a state and a draw of its own, so joining and leaving copies nothing, and the
tokens of a sequence are those that it has alone.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ds4mlx.engine.ahead import Ahead, Seen
from ds4mlx.engine.interrupts import undivided
from ds4mlx.engine.sequence import NOT_FINITE, Sequence
from ds4mlx.engine.step import go_back, not_finite, rows_of
from ds4mlx.engine.undone import Place, undone_on_failure
from ds4mlx.errors import DataError
from ds4mlx.model.model import MOST_STEPPED, Model
from ds4mlx.model.taps import steady
from ds4mlx.state.decode_state import DecodeState


@dataclass(frozen=True)
class Taken:
    """The token that a sequence took in a step, and the text that it brought.

    logits: float32 (1, vocab), those that it was drawn from; streams (1, n, D), those that they were
    made of, where they are kept. error: why there is no token, if there is none; its sequence has
    left, with its state as before the step that failed.
    """

    sequence: Sequence
    token: int
    text: str
    logits: mx.array
    error: DataError | None = None
    streams: mx.array | None = None


@dataclass
class _Draw:
    """A token int32 (1,), on its way, and the logits (1, vocab) that it is drawn from.

    token: None where it is drawn when all before it are taken. before: the length of the state that
    the logits were computed from. streams: (1, n, D), where they are kept.
    """

    token: mx.array | None
    logits: mx.array
    before: int
    streams: mx.array | None = None


class _Member:
    """A sequence, and what is on its way for it: the next token, or the step ahead with its own."""

    def __init__(self, sequence: Sequence, draw: _Draw | None):
        self.sequence, self.draw = sequence, draw
        self.ahead: tuple[Ahead, _Draw] | None = None

    @property
    def goes_on(self) -> bool:
        """Whether a token may follow the one that is about to be read."""
        return self.sequence.drawn + 1 < self.sequence.max_tokens

    @property
    def token(self) -> mx.array:
        """int32 (1,): the one that is about to be read."""
        assert self.draw is not None and self.draw.token is not None
        return self.draw.token

    def step_back(self) -> None:
        """Drop what is on its way: the state is that of all tokens but the last."""
        if self.draw is not None:
            state = self.sequence.state
            go_back(state, max(self.draw.before, state.offset - 1))
        self.draw = self.ahead = None


class Decoding:
    """Up to 8 sequences of one model; they join and leave between steps, and leave when they end.

    streams: keep those that every step makes.
    """

    def __init__(self, model: Model, streams: bool = False):
        self.model, self._streams = model, streams
        self._members: list[_Member] = []
        self._seen = Seen(model)
        self._failed: tuple[list[_Member], Exception] | None = None

    @property
    def sequences(self) -> list[Sequence]:
        """Those that go on, in the order in which they joined."""
        return [member.sequence for member in self._members]

    def __len__(self) -> int:
        return len(self._members)

    def add(self, sequence: Sequence, logits: mx.array | None = None, before: int = 0) -> None:
        """Have a sequence join, whose state has taken all its tokens or all but the last.

        logits: float32 (1, vocab) after all of them, or None if the last is yet to be fed. before:
        the length from which the logits were computed, to which the state goes back if they are
        not finite. Raises DataError if there is no room, or the sequence has ended or is in already.
        """
        if len(self) == MOST_STEPPED:
            raise DataError(f"{MOST_STEPPED} sequences go on already: no more fit in a step")
        if sequence in self.sequences:
            raise DataError("the sequence goes on already")
        if sequence.reason or sequence.drawn >= sequence.max_tokens:
            raise DataError("the sequence has ended")
        draw = None
        if logits is not None:
            token = None if sequence.waits else sequence.draw(logits)
            draw = _Draw(token, logits, before)
            mx.async_eval(logits if token is None else (token, logits))
        self._members.append(_Member(sequence, draw))

    def remove(self, sequence: Sequence) -> None:
        """Have a sequence leave before its end; its state is that of its tokens but the last."""
        self._members = [m for m in self._members if m.sequence is not sequence]

    def apart(self) -> list["Decoding"]:
        """Each sequence in a `Decoding` of its own, with the token that it is to take; none stays.

        So that after a step that failed it can be found out which of them makes it fail.
        """
        members, self._members = self._members, []
        alone = [Decoding(self.model) for _ in members]
        for one, member in zip(alone, members, strict=True):
            member.ahead = None
            one._members = [member]
        return alone

    def step(self) -> list[Taken]:
        """The next token of each sequence, which has taken it; the step after is submitted.

        Where the model or a sampler fails every state is as before the step. If that happens to a
        step ahead, it is told when its token is asked for. Ctrl-C comes when all is done.
        """
        with undivided():
            self._catch_up()
            failed = self._draw_late()
            self._run_ahead()
            tokens, members = self._read(), self._members
            ends = [member.sequence.state.offset for member in members]
            taken = [self._taken(m, token) for m, token in zip(members, tokens, strict=True)]
        return failed + [
            replace(each, error=not_finite(self.model, each.sequence, end))
            if each.token == NOT_FINITE
            else each
            for each, end in zip(taken, ends, strict=True)
        ]

    def _catch_up(self) -> None:
        """Every member has a draw: that of the step ahead, or else one of a step that is made now."""
        failed, self._failed = self._failed, None
        behind, same = [], self._seen.same()
        if not same:
            self._seen = Seen(self.model)
        for member in self._members:
            if member.draw is not None:
                continue
            if same and member.ahead is not None and member.ahead[0].take():
                member.draw = member.ahead[1]
            else:
                behind.append(member)
            member.ahead = None
        if same and failed and behind == failed[0]:
            raise failed[1]
        if behind:
            made = self._fed(behind, [member.sequence.pending for member in behind])
            for member, draw in zip(behind, made, strict=True):
                member.draw = draw

    def _draw_late(self) -> list[Taken]:
        """Draw what waits for the tokens before it. Whose rule fails leaves, and is told of."""
        failed = []
        for member in list(self._members):
            sequence, draw = member.sequence, member.draw
            if draw is None or not (draw.token is None or sequence.waits):
                continue
            try:
                draw.token = sequence.draw(draw.logits)
            except DataError as error:
                member.step_back()
                self.remove(sequence)
                failed.append(Taken(sequence, NOT_FINITE, "", draw.logits, error))
            except BaseException:
                self._step_back()
                raise
        return failed

    def _step_back(self) -> None:
        """Nothing is on its way any more; the states are back before what was."""
        for member in self._members:
            member.step_back()

    def _run_ahead(self) -> None:
        """Submit the step that feeds the tokens which are about to be read, where any may follow."""
        going = [m for m in self._members if m.goes_on]
        if not going or not steady():
            return
        places = [Place.of(member.sequence.state) for member in going]
        try:
            with undone_on_failure(place.state for place in places):
                # What is no token, and not finite either, is not looked up anywhere.
                tokens = mx.concatenate([member.token for member in going])
                tokens = mx.clip(tokens, 0, self.model.args.vocab_size - 1)
                made = self._fed(going, tokens[:, None], unread=1)
                aheads = [Ahead(place) for place in places]
        except Exception as error:  # noqa: BLE001 - it is raised later
            self._failed = going, error
            return
        for member, ahead, draw in zip(going, aheads, made, strict=True):
            member.ahead = ahead, draw

    def _fed(
        self, members: list[_Member], tokens: mx.array | list[list[int]], unread: int = 0
    ) -> list[_Draw]:
        """Submit a step that feeds these tokens; what it draws. A failure changes no state."""
        sequences = [member.sequence for member in members]
        states = [sequence.state for sequence in sequences]
        before = [state.offset for state in states]
        with undone_on_failure(states):
            rows, streams = self._outputs(tokens, states)
            made = [
                _Draw(None if s.waits else s.draw(row, unread), row, length, each)
                for s, row, length, each in zip(sequences, rows, before, streams, strict=True)
            ]
            mx.async_eval([draw.token for draw in made if draw.token is not None], rows)
        return made

    def _outputs(
        self, tokens: mx.array | list[list[int]], states: list[DecodeState]
    ) -> tuple[list[mx.array], list[mx.array] | list[None]]:
        """Of each state the logits (1, vocab) and, where they are kept, the streams (1, n, D)."""
        if not self._streams:
            return rows_of(self.model.last_logits(tokens, states)), [None] * len(states)
        logits, streams = self.model.last(tokens, states)
        return rows_of(logits), rows_of(streams)

    def _read(self) -> list[int]:
        """The members' tokens; if they cannot be computed, the states are back before them."""
        try:
            return [int(token) for member in self._members for token in np.array(member.token)]
        except BaseException:
            self._step_back()
            raise

    def _taken(self, member: _Member, token: int) -> Taken:
        """What a member's token brings; the member leaves if that ends it."""
        sequence, draw = member.sequence, member.draw
        assert draw is not None
        member.draw = None
        if not 0 <= token < self.model.args.vocab_size:
            member.ahead = None  # another token was fed
        if token == NOT_FINITE:
            go_back(sequence.state, draw.before)
            self.remove(sequence)
            return Taken(sequence, token, "", draw.logits)
        text = sequence.take(token)
        if sequence.reason:
            self.remove(sequence)
        return Taken(sequence, token, text, draw.logits, streams=draw.streams)
