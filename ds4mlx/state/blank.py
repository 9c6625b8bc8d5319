"""States whose rows are zeros that nobody makes: to build graphs at any depth without evaluating them."""

import mlx.core as mx

from ds4mlx.state.decode_state import DecodeState


def fill_blank(state: DecodeState, tokens: int) -> DecodeState:
    """Have an empty state be as after so many tokens, all of whose rows are zeros; gives it back."""
    for layer in state:
        kept = min(tokens, layer.before)
        layer.window.load(mx.zeros((kept, layer.form.elements), layer.form.dtype), tokens)
        for part in layer.compressors:
            recent = tokens - part.needed(tokens)
            part.recent.load(mx.zeros((recent, 2, part.channels)), tokens)
            count = tokens // part.ratio
            shape = part.rows.capacity(count), part.form.elements
            part.rows.load(mx.zeros(shape, part.form.dtype), count)
    return state
