"""What the draft block proposes: the next tokens of a sequence, from the streams of those before.

The block reads the streams at position t together with token t + 1, and proposes token t + 2. For a
token further on it reads its own streams instead. It has rows of its own, which count positions from
wherever it began, since a window needs their differences only; so it can begin anywhere, and does so
anew where streams are missing in between.
"""

import mlx.core as mx

from ds4mlx.engine.proposals import Proposal, propose
from ds4mlx.engine.sequence import Sequence
from ds4mlx.model.model import Model
from ds4mlx.state.drafts import Drafts


class Drafter:
    """Proposes tokens of one sequence. It must be told the streams of every token that is fed."""

    def __init__(self, model: Model, sequence: Sequence):
        self.model, self.sequence = model, sequence
        self._window = model.args.sliding_window
        self.forget()

    def forget(self) -> None:
        """Begin anew with the streams that are told next."""
        self._drafts = Drafts(self.model.args, self.model.state_form)
        self._unread: list[mx.array] = []  # streams (1, L, n, D) up to position `_end`
        self._end = 0

    def saw(self, streams: mx.array) -> None:
        """Streams (1, L, n, D) of the last L tokens that the state has taken."""
        end, length = self.sequence.state.offset, streams.shape[1]
        if end - length != self._end:
            self.forget()
        if length > self._window:
            streams = mx.contiguous(streams[:, -self._window :])
            mx.eval(streams)
        self._unread.append(streams)
        self._end = end
        while sum(each.shape[1] for each in self._unread[1:]) >= self._window:
            del self._unread[0]
            self._drafts.rewind(0)

    def propose(self, count: int, alone: bool) -> list[Proposal]:
        """What may be the next `count` tokens after those of the sequence, of which the last is yet to
        be fed; none if its streams are not known. Nothing is evaluated."""
        sequence = self.sequence
        if not count or not self._unread or self._end != sequence.state.offset:
            return []
        streams = mx.concatenate(self._unread, axis=1)
        last = self._end - sequence.first
        tokens = mx.array([sequence.tokens[last + 1 - streams.shape[1] : last + 1]])
        self._unread, proposals = [], list[Proposal]()
        read = self._drafts[0].offset + streams.shape[1]
        for number in range(count):
            logits, streams = self.model.draft(streams, tokens, self._drafts)
            key = sequence.key(number)
            proposals.append(propose(sequence.sampler, logits[:, -1], key, alone))
            streams, tokens = streams[:, -1:], proposals[-1].token[None]
        self._drafts.rewind(read)
        return proposals
