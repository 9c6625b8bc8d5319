"""Hides one kind of compressed rows from a model, to see what they carry."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from ds4mlx.model.attention import Attention, Context
from ds4mlx.model.model import Model

RATIOS = {"CSA": 4, "HCA": 128}


@contextlib.contextmanager
def hidden_rows(model: Model, kind: str) -> Iterator[None]:
    """Within the block the compressed rows of CSA or of HCA layers are attended by no query.

    kind: a key of RATIOS. The rows are still made, so a decode state stays whole; the window rows
    and the sink of the layer share the softmax among themselves.
    """
    chosen = [layer.attn for layer in model.layers if layer.attn.ratio == RATIOS[kind]]
    for attention in chosen:
        attention.contexts = _without_rows(attention)
    try:
        yield
    finally:
        for attention in chosen:
            del attention.contexts


def _without_rows(attention: Attention) -> Callable[..., list[Context]]:
    usual = attention.contexts

    def contexts(*arguments) -> list[Context]:
        return [replace(c, rows=c.rows[:0], selection=None) for c in usual(*arguments)]

    return contexts
