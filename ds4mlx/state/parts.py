"""The parts of a few layers' states, listed once: a step asks something of each of them every token."""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from ds4mlx.state.buffers import Recent, Rows
from ds4mlx.state.layer import LayerState

# Tokens to a compressed row, of the layers of each kind.
RATIOS = (4, 128)


class Parts:
    """Everything in some layers that grows; iterating gives it, layer by layer.

    Which parts there are never changes, and nothing of what they hold is kept here. windows: those of
    the layers. recents, and by ratio rows: the parts of each kind.
    """

    def __init__(self, layers: Sequence[LayerState]):
        self.windows = [layer.window for layer in layers]
        self.every: list[Recent | Rows] = [part for layer in layers for part in layer.parts]
        self.recents = [part for part in self.every if isinstance(part, Recent)]
        rows = [part for part in self.every if isinstance(part, Rows)]
        self.rows = {ratio: [part for part in rows if part.ratio == ratio] for ratio in RATIOS}
        self._layers = [number for number, layer in enumerate(layers) for _ in layer.parts]

    def __iter__(self) -> Iterator[Recent | Rows]:
        return iter(self.every)

    @property
    def fields(self) -> list[dict[str, Any]]:
        """What every part holds, by name: its own attributes, to be looked at or changed."""
        return list(map(vars, self.every))

    def spread(self, each: Sequence[mx.array]) -> list[mx.array]:
        """For every part what there is of its layer."""
        return [each[layer] for layer in self._layers]

    @property
    def arrays(self) -> list[mx.array]:
        """The tails of every layer of a settled state, then the buffers of all parts."""
        tails = [tail for part in self.windows if (tail := part.tail) is not None]
        return tails + [array for part in self.every if (array := part.buffer) is not None]

    @property
    def capacity(self) -> int:
        """The most rows for which one of the buffers that only grow has room."""
        each = [part.buffer for rows in self.rows.values() for part in rows]
        return max([0 if buffer is None else len(buffer) for buffer in each], default=0)
