"""What reaches the routed experts: sums of squares of their inputs, and of products, as a model runs."""

import contextlib
from collections.abc import Iterable, Iterator

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


class MomentRecorder:
    """Sums of x x^T over rows x, float32: of all (1, columns, columns), or of each of `experts`."""

    def __init__(self, experts: int | None, columns: int):
        self.experts, self._empty = experts, mx.zeros((experts or 1, columns, columns))
        self._sums = self._empty

    def add(self, x: mx.array, experts: mx.array) -> mx.array:
        """x (N, columns), or (N, k, columns) for experts int (N, k), as it is; the sums grow by it."""
        rows, met = x.reshape(-1, x.shape[-1]).astype(mx.float32), experts.reshape(-1, 1)
        if self.experts is None:
            parts = [rows.T @ rows]
        else:
            parts = [rows.T @ mx.where(met == expert, rows, 0) for expert in range(self.experts)]
        self._sums = self._sums + mx.stack(parts)
        return mx.depends([x], [self._sums])[0]

    def take(self) -> np.ndarray:
        """The sums since the last take."""
        sums, self._sums = np.array(self._sums), self._empty
        return sums


class _Experts(Listener):
    """Gives the recorders of each layer what its experts are given; replaces nothing."""

    def __init__(
        self,
        recorders: dict[tuple[int, str], Recorder],
        moments: dict[tuple[int, str], MomentRecorder],
    ):
        self.recorders, self.moments = recorders, moments
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
        recorder, more = self.recorders[self._parts[name]], self.moments.get(self._parts[name])
        if name.endswith(".in"):
            self._given = value
        elif name.endswith(".router.experts"):
            self._experts = value
            given = [each.add(self._given, value) for each in (recorder, more) if each]
            value = mx.depends([value], given)[0]
        else:
            for each in (recorder, more):
                value = each.add(value, self._experts) if each else value
        return value


@contextlib.contextmanager
def recording(
    model: Model, moments: Iterable[tuple[int, str]] = ()
) -> Iterator[tuple[dict[tuple[int, str], Recorder], dict[tuple[int, str], MomentRecorder]]]:
    """Recorders of every main layer's w1 and w2, by (layer, name), for the time of the block.

    Beside them are those of `moments`: of w1 a layer's, of w2 each expert's.

    w3 has the input of w1. The MTP block does not run here, and imatrix files have no place for it.
    """
    config = model.args
    columns = {"w1": config.hidden_size, "w2": config.moe_intermediate_size}
    recorders = {
        (layer, part): Recorder(config.n_routed_experts, width)
        for layer in range(config.num_hidden_layers)
        for part, width in columns.items()
    }
    more = {
        (layer, part): MomentRecorder(
            None if part == "w1" else config.n_routed_experts, columns[part]
        )
        for layer, part in moments
    }
    with listening(_Experts(recorders, more)):
        yield recorders, more
