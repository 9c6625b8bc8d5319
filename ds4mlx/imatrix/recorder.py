"""What reaches the routed experts: sums of squares of their inputs, while a model runs."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels.products.experts import SORT_FROM
from ds4mlx.model.batch import Span
from ds4mlx.model.model import Model
from ds4mlx.model.taps import Listener, listening


class Recorder:
    """Each expert's sums of the squares of the rows that meet it in one stack of experts."""

    def __init__(self, experts: int, columns: int):
        self._empty = (mx.zeros((experts, columns)), mx.zeros((experts, 1)))
        self._sums = self._empty

    def add(self, x: mx.array, experts: mx.array) -> mx.array:
        """x (N, columns) or (N, k, columns) as it is, for experts int (N, k); the sums grow by it."""
        rows = x if x.ndim == 3 else x[:, None]
        rows, met = mx.broadcast_to(rows, (*experts.shape, x.shape[-1])), experts.flatten()
        rows = rows.flatten(0, 1)
        if len(met) >= SORT_FROM:  # in the order of the products
            order = mx.argsort(met)
            rows, met = rows[order], met[order]
        squares, counts = self._sums
        # A product, as its order of summation is fixed: a scatter-add on a GPU has none.
        met = (met == mx.arange(counts.shape[0])[:, None]).astype(mx.float32)
        squares = squares + met @ mx.square(rows.astype(mx.float32))
        self._sums = (squares, counts + met.sum(1, keepdims=True))
        # Evaluated with what is given back, so that no layer's rows outlive the layer.
        return mx.depends([x], list(self._sums))[0]

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums since the last take, float32: squares (experts, columns), tokens (experts, 1)."""
        squares, counts = self._sums
        self._sums = self._empty
        return np.array(squares), np.array(counts)


class _Experts(Listener):
    """Gives the recorders of each layer what its experts are given; replaces nothing."""

    def __init__(self, recorders: dict[tuple[int, str], Recorder]):
        self.recorders = recorders
        layers = {layer for layer, _ in recorders}
        self._parts = {f"layers.{i}.ffn.router.experts": (i, "w1") for i in layers}
        self._parts |= {f"layers.{i}.ffn.in": (i, "w1") for i in layers}
        self._parts |= {f"layers.{i}.ffn.experts.hidden": (i, "w2") for i in layers}
        self._given = self._experts = mx.array([])

    def wants(self, name: str) -> bool:
        """The inputs of w1 and of w2, and the choice of experts between them."""
        return name in self._parts

    def take(self, name: str, value: mx.array, span: Span | None) -> mx.array:
        """The same value; the layer's inputs are known before its experts are."""
        recorder = self.recorders[self._parts[name]]
        if name.endswith(".in"):
            self._given = value
        elif name.endswith(".router.experts"):
            self._experts = value
            value = mx.depends([value], [recorder.add(self._given, value)])[0]
        else:
            value = recorder.add(value, self._experts)
        return value


@contextlib.contextmanager
def recording(model: Model) -> Iterator[dict[tuple[int, str], Recorder]]:
    """Recorders of every main layer's w1 and w2, by (layer, name), for the time of the block.

    w3 has the input of w1. The MTP block does not run here, and imatrix files have no place for it.
    """
    config = model.args
    columns = {"w1": config.hidden_size, "w2": config.moe_intermediate_size}
    recorders = {
        (layer, part): Recorder(config.n_routed_experts, width)
        for layer in range(config.num_hidden_layers)
        for part, width in columns.items()
    }
    with listening(_Experts(recorders)):
        yield recorders
