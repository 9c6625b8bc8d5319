"""Evaluating a chunk of a prompt by halves of its layers, each while the next one is built.

The device would wait for the graph of all layers otherwise, and could have scratch of many of them in
memory. What a layer changes in a state is handed over at once: as long as the state holds a buffer of
rows, the next rows are written to a copy of it.
"""

import weakref
from collections import deque
from collections.abc import Sequence

import mlx.core as mx

from ds4mlx.model.batch import Batch
from ds4mlx.model.block import Block
from ds4mlx.state.layer import LayerState
from ds4mlx.state.step import commit

# Tokens of which a half may be submitted and not done when the next one is built; at least one is,
# and several of short chunks, which the device is through with sooner.
AHEAD = 2048


class Pace:
    """The layers of one call, as they are built."""

    def __init__(self, batch: Batch):
        self._batch = batch
        self._steps = [span.step for span in batch.spans]
        self._ahead = max(1, AHEAD // batch.ids.size)
        self._submitted: deque[mx.array] = deque()
        own = weakref.proxy(self)  # or the steps' arrays would stay until Python looks for circles
        for step in self._steps:
            step.submit = lambda array: own._submit(array)

    def through(self, layer: Block, streams: mx.array, states: Sequence[LayerState]) -> mx.array:
        """Streams (N, n, D) -> those after a layer, of which both halves are submitted."""
        streams = layer.attended(streams, self._batch, states)
        self._submit(streams, self._ahead)
        streams = layer.fed(streams, self._batch)
        self._submit(streams, self._ahead)
        return streams

    def _submit(self, array: mx.array, ahead: int = 1) -> None:
        """Begin to evaluate an array, and wait for all but the last `ahead` of those before it."""
        arrays = [array for step in self._steps for array in (*step.arrays, *step.cut())]
        commit(self._steps)
        for step in self._steps:
            step.clear()
        mx.async_eval(array, *arrays)
        self._submitted.append(array)
        while len(self._submitted) > ahead:
            mx.eval(self._submitted.popleft())
