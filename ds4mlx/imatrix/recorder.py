"""What reaches the routed experts: sums of squares of their inputs, while a model runs."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ds4mlx.model.linear import ExpertStack
from ds4mlx.model.model import Model


class Recorder(nn.Module):
    """Stands in for one stack of experts: the same products, and the squares of what it is given."""

    def __init__(self, stack: ExpertStack, experts: int, columns: int):
        super().__init__()
        self.stack = stack
        self._empty = (mx.zeros((experts, columns)), mx.zeros((experts, 1)))
        self._sums = self._empty

    def __call__(self, x: mx.array, experts: mx.array, ordered: bool = False) -> mx.array:
        """As ExpertStack. Each expert's sums grow by the rows that meet it."""
        rows = mx.broadcast_to(x.squeeze(-2), (*experts.shape, x.shape[-1])).flatten(0, -2)
        squares, counts = self._sums
        # A product, as its order of summation is fixed: a scatter-add on a GPU has none.
        met = experts.flatten() == mx.arange(counts.shape[0])[:, None]
        met = met.astype(mx.float32)
        squares = squares + met @ mx.square(rows.astype(mx.float32))
        self._sums = (squares, counts + met.sum(1, keepdims=True))
        # Evaluated with the product, so that no layer's rows outlive the layer.
        return mx.depends([self.stack(x, experts, ordered)], list(self._sums))[0]

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums since the last take, float32: squares (experts, columns), tokens (experts, 1)."""
        squares, counts = self._sums
        self._sums = self._empty
        return np.array(squares), np.array(counts)


@contextlib.contextmanager
def recording(model: Model) -> Iterator[dict[tuple[int, str], Recorder]]:
    """Recorders of every main layer's w1 and w2, by (layer, name), for the time of the block.

    w3 has the input of w1. The MTP block does not run here, and imatrix files have no place for it.
    """
    config = model.args
    columns = {"w1": config.hidden_size, "w2": config.moe_intermediate_size}
    layers = [layer.ffn.experts for layer in model.layers]
    stacks = {(i, part): experts[part] for i, experts in enumerate(layers) for part in columns}
    recorders = {
        place: Recorder(stack, config.n_routed_experts, columns[place[1]])
        for place, stack in stacks.items()
    }
    try:
        for (layer, part), recorder in recorders.items():
            layers[layer][part] = recorder
        yield recorders
    finally:
        for (layer, part), stack in stacks.items():
            layers[layer][part] = stack
