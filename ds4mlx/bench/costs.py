"""What a decoded token costs: launches by kernel, MLX's own operations, and the bytes of both.

Two counts of bytes stand side by side. By arithmetic: each weight that takes part once, the chosen
experts of each sequence, and the rows of the state that attention has to see. As moved: what all
launches and operations read and write. The step is recorded, so that the counts are those of a target
on a machine of any kind; without a GPU, however, MLX builds some of its own operations of several.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ds4mlx.convert.inspection import bytes_per_token
from ds4mlx.custom_kernels import dialect, dispatch, graph
from ds4mlx.custom_kernels.dialect import Target
from ds4mlx.custom_kernels.recorder import Operation
from ds4mlx.custom_kernels.recording import recording
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.row_forms import row_bytes
from ds4mlx.state.tails import settle
from ds4mlx.weights.inventory import COMPONENTS, component


@dataclass(frozen=True)
class Cost:
    """Of one step of some sequences.

    kernels, others: launches by kernel, and MLX's own operations by kind. moved: bytes, or None where
    MLX does not tell the shapes of one of its operations; largest: bytes of the largest output.
    """

    layers: int
    kernels: dict[str, int]
    others: dict[str, int]
    moved: int | None
    largest: int | None

    @property
    def launches(self) -> int:
        """All of them, those before the first layer and after the last too."""
        return sum(self.kernels.values()) + sum(self.others.values())

    @property
    def launches_per_layer(self) -> float:
        """All of them, over the number of layers."""
        return self.launches / self.layers


def cost(model: Model, states: Sequence[DecodeState], target: Target | None) -> Cost:
    """Of the next step of some sequences, as it is launched on a target; None: by plain operations.

    Of this machine's own target only those kernels count that are good here. The states are of no use
    afterwards.
    """
    # What launches have done for many tokens at a time is no part of one.
    for state in states if target is not None else ():
        settle(state)
        mx.eval(state.arrays)
    with _recorded(target) as launches:
        token = mx.argmax(model.step(mx.zeros((len(states),), mx.int32), states), axis=-1)
    try:
        listed = [*launches, *graph.operations(token)]
    except ValueError:
        listed = None
    return Cost(
        len(model.layers),
        dict(Counter(launch.name for launch in launches).most_common()),
        dict(graph.kinds(token).most_common()),
        None if listed is None else sum(each.moved for each in listed),
        None if listed is None else max(each.largest for each in listed),
    )


@contextlib.contextmanager
def _recorded(target: Target | None) -> Iterator[list[Operation]]:
    if target is None:
        with dispatch.plain_operations():
            yield []
    else:
        with recording(target, every=dialect.target() != target) as launches:
            yield launches


def weights_read(model: Model, sequences: int) -> int:
    """Bytes of weights that one step reads, by arithmetic: every sequence reads its own experts."""
    sizes: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    parameters: Any = tree_flatten(model.parameters())
    for name, array in parameters:
        sizes[component(name)] += array.nbytes
    return bytes_per_token(sizes, model.args, sequences)


def rows_read(model: Model, depth: int) -> int:
    """Bytes of a state's rows that one step at a depth has to see: window, chosen rows, index rows."""
    config, form = model.args, model.state_form
    total = 0
    for block in range(config.num_hidden_layers):
        ratio = config.ratio(block)
        rows = (depth + 1) // ratio if ratio else 0
        total += min(depth + 1, config.sliding_window) * row_bytes(form.kv)
        if ratio != 4:
            total += rows * row_bytes(form.kv)
            continue
        total += min(rows, config.index_topk) * row_bytes(form.kv)
        if rows > config.index_topk:
            total += rows * row_bytes(form.index)
    return total
