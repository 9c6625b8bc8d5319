"""Decode states whose bytes follow from their tokens, without running a model.

Row j of a compressor of ratio m follows from token m * (j + 1) - 1, a window row or projection from
its own token; so states of sequences with a common beginning share what real ones share.
"""

import mlx.core as mx
import numpy as np

from ds4mlx.config import ModelConfig
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.kind import StateKind
from ds4mlx.store.state_bytes import parts

# A model of every kind of attention, whose states are small.
SMALL = ModelConfig(
    vocab_size=512, hidden_size=64, num_hidden_layers=3, num_nextn_predict_layers=0,
    compress_ratios=(0, 4, 128), num_hash_layers=0, num_attention_heads=2, head_dim=96,
    qk_rope_head_dim=32, q_lora_rank=32, o_groups=1, o_lora_rank=32, index_n_heads=2,
    index_head_dim=32, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
)  # fmt: skip


def synthetic_state(model: Model | StateKind, tokens: np.ndarray, spacing: int = 0) -> DecodeState:
    """The state after `tokens`; with `spacing` it has records at its multiples."""
    state, count = model.make_cache(), len(tokens)
    if spacing:
        kept = state.boundaries.spacing.thinned(range(spacing, count + 1, spacing), count)
        for position in sorted(kept):
            _load_recent(state, tokens, position)
            state.records[position] = mx.array(np.array(state.record(position)))
    _load_recent(state, tokens, count)
    for number, part in enumerate(parts(state)):
        rows = count // part.ratio
        if rows:
            words = part.form.dtype.size * part.form.elements // 4
            values = np.zeros((part.rows.capacity(rows), words), np.uint32)
            values[:rows] = _pattern(tokens[part.ratio - 1 :: part.ratio][:rows], words, number)
            part.rows.load(mx.array(values).view(part.form.dtype), rows)
    mx.eval(state.arrays)
    return state


def same_state(state: DecodeState, other: DecodeState) -> bool:
    """Whether two states agree in every byte that continuing reads."""
    if state.offset != other.offset:
        return False
    count = state.offset
    if not np.array_equal(np.array(state.record(count)), np.array(other.record(count))):
        return False
    pairs = zip(parts(state), parts(other), strict=True)
    return all(np.array_equal(a.view(0, count), b.view(0, count)) for a, b in pairs)


def _load_recent(state: DecodeState, tokens: np.ndarray, end: int) -> None:
    for number, layer in enumerate(state):
        form, first = layer.form, max(0, end - layer.window.keep)
        words = form.elements * form.dtype.size // 4
        rows = _pattern(tokens[first:end], words, 1000 + number)
        layer.window.load(mx.array(rows).view(form.dtype), end)
        for place, part in enumerate(layer.compressors):
            first = max(0, end - part.recent.keep)
            values = _pattern(tokens[first:end], 2 * part.channels, 2000 + 2 * number + place)
            shape = (end - first, 2, part.channels)
            part.recent.load(mx.array(values.astype(np.float32).reshape(shape)), end)


def _pattern(tokens: np.ndarray, words: int, salt: int) -> np.ndarray:
    """uint32 (len(tokens), words)."""
    mixed = tokens.astype(np.uint32) * np.uint32(2654435761) + np.uint32(salt * 40503)
    return mixed[:, None] + np.arange(words, dtype=np.uint32) * np.uint32(2246822519)
