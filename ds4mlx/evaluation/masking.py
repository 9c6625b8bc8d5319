"""Hides one kind of compressed rows from a model, to see what they carry."""

import contextlib

import mlx.core as mx

from ds4mlx.model.batch import Span
from ds4mlx.model.model import Model
from ds4mlx.model.taps import Listener, listening
from ds4mlx.state.changes import NAMELESS

RATIOS = {"CSA": 4, "HCA": 128}


class _Hidden(Listener):
    """No query sees a compressed row in the layers of one kind."""

    changes = NAMELESS

    def __init__(self, model: Model, kind: str):
        ratio, layers = RATIOS[kind], enumerate(model.layers)
        self.names = {f"layers.{i}.attn.visible" for i, b in layers if b.attn.ratio == ratio}

    def wants(self, name: str) -> bool:
        """Which rows are visible in such a layer."""
        return name in self.names

    def take(self, name: str, value: mx.array, span: Span | None) -> mx.array:
        """None of them."""
        return mx.zeros_like(value)


def hidden_rows(model: Model, kind: str) -> contextlib.AbstractContextManager[None]:
    """Within the block the compressed rows of CSA or of HCA layers are attended by no query.

    kind: a key of RATIOS. The rows are still made, so a decode state stays whole; the window rows
    and the sink of the layer share the softmax among themselves.
    """
    return listening(_Hidden(model, kind))
