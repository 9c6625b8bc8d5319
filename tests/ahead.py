"""Sequences to decode ahead, what their states show, and the same where nothing is ahead."""

import numpy as np

from ds4mlx import DecodeState
from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.sampling import Sampler
from ds4mlx.engine.step import draw, step
from ds4mlx.state.boundaries import Spacing

IDS = np.random.default_rng(4).integers(2, 288, 400).tolist()
NEAR = Spacing(16, 64, 32)
SEEDED = Sampler(seed=5)


def bits(state: DecodeState) -> list[bytes]:
    """Everything that continuing or going back reads."""
    arrays = [np.array(state.record(state.offset))] if state.offset else []
    arrays += [np.array(record) for _, record in sorted(state.records.items())]
    parts = [part for layer in state for part in layer.compressors if part.rows.count]
    arrays += [np.array(part.rows.buffer[: part.rows.count]) for part in parts]
    return [array.tobytes() for array in arrays]


def shown(state):
    """All that a state shows, to the bit."""
    lengths = [layer.offset for layer in (*state, *state.drafts)]
    records, asked = sorted(state.records), state.boundaries.asked
    return lengths, records, asked, state.stored, state.drafts.records, bits(state)


def join(decoding, sequence):
    logits = prefill(decoding.model, sequence.pending, sequence.state)
    decoding.add(sequence, logits)


def one_by_one(model, sequence, count, between=lambda: None):
    """What a sequence shows after each of its tokens where nothing is submitted ahead."""
    tokens = draw([sequence], prefill(model, sequence.pending, sequence.state))
    seen = []
    while True:
        sequence.take(tokens[0])
        between()
        seen.append((sequence.tokens[-1], shown(sequence.state)))
        if len(seen) == count or sequence.reason:
            return seen
        tokens, _ = step(model, [sequence])
