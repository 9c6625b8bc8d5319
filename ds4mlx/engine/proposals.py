"""Proposed tokens: how a draft draws one, and how what the model would draw decides on it.

Whatever the draft is like, a token that comes out is distributed as one drawn from the model's own
logits. There are two ways to that.

A proposal that was drawn with the key of its position is compared with what the model's logits give
by the same key: it is accepted if it is that token. What comes out is token for token what comes out
without a draft.

A proposal that was drawn by itself, with probability q, is accepted with probability min(1, p / q), p
being the model's; in its place a token is drawn in proportion to max(0, p - q). That accepts as
many as any way can.
"""

from dataclasses import dataclass

import mlx.core as mx

from ds4mlx.engine.sampling import Sampler


@dataclass(frozen=True)
class Proposal:
    """A token int32 (1,) that may come next.

    log_probs: float32 (1, vocab), by which it was drawn by itself; None if with its position's key.
    """

    token: mx.array
    log_probs: mx.array | None = None


def propose(sampler: Sampler, logits: mx.array, key: mx.array, alone: bool) -> Proposal:
    """A draft's proposal from its logits (1, vocab); alone: drawn by itself. Nothing is evaluated."""
    logits = mx.where(mx.isfinite(logits), logits, 0)
    if not alone:
        return Proposal(sampler(logits, key))
    own, _, _ = _keys(key)
    chances = sampler.log_probs(logits)
    return Proposal(mx.random.categorical(chances, key=own).astype(mx.int32), chances)


def drawn(sampler: Sampler, logits: mx.array, key: mx.array, proposal: Proposal | None) -> mx.array:
    """The next token, int32 (1,), from the model's logits (1, vocab). Nothing is evaluated."""
    if proposal is None or proposal.log_probs is None:
        return sampler(logits, key)
    _, accepts, others = _keys(key)
    p, q = mx.exp(sampler.log_probs(logits)), mx.exp(proposal.log_probs)
    left = mx.maximum(p - q, 0)
    left = mx.where(mx.sum(left) > 0, left, p)  # nothing is left where rounding alone rejects
    other = mx.random.categorical(mx.log(left), key=others)
    at = proposal.token[:, None]
    ratio = (mx.take_along_axis(p, at, axis=-1) / mx.take_along_axis(q, at, axis=-1))[:, 0]
    accepted = mx.random.uniform(shape=(1,), key=accepts) < ratio
    return mx.where(accepted, proposal.token, other).astype(mx.int32)


def _keys(key: mx.array) -> mx.array:
    """Of a position's key those of the proposal, of accepting it, and of what takes its place."""
    return mx.random.split(key, 3)
