"""Evaluating a chunk of a prompt layer by layer, each while the next one is built.

The device would wait for the graph of all layers otherwise, and could have scratch of many of them in
memory. What a layer changes in a state is handed over at once: as long as the state holds a buffer of
rows, the next rows are written to a copy of it.
"""

from collections import deque

import mlx.core as mx

from ds4mlx.model.batch import Batch
from ds4mlx.state.step import commit

# Layers that may be submitted and not done when the next one is built.
AHEAD = 1


class Pace:
    """The layers of one call, as they are built."""

    def __init__(self, batch: Batch):
        self._steps = [span.step for span in batch.spans]
        self._submitted: deque[mx.array] = deque()

    def after_layer(self, streams: mx.array) -> None:
        """Begin to evaluate a layer that gives `streams`, and wait for those long before it."""
        arrays = [array for step in self._steps for array in (*step.arrays, *step.cut())]
        commit(self._steps)
        for step in self._steps:
            step.changes.clear()
        mx.async_eval(streams, *arrays)
        self._submitted.append(streams)
        if len(self._submitted) > AHEAD:
            mx.eval(self._submitted.popleft())
