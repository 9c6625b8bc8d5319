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
        attention.context = _without_rows(attention)
    try:
        yield
    finally:
        for attention in chosen:
            del attention.context


def _without_rows(attention: Attention) -> Callable[..., Context]:
    usual = attention.context

    def context(*arguments) -> Context:
        return replace(usual(*arguments), rows=None, index_q=None)

    return context
