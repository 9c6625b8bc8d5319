"""What decode states are states of: all that is needed to make them, and to tell whose they are."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4mlx.config import ModelConfig
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.rounding import Rounding
from ds4mlx.state.row_forms import StateForm


@dataclass(frozen=True)
class StateKind:
    """The states of one model. States of two kinds that are equal may be exchanged.

    dtype is that of the activations; `weights` names the weights: the checksum of a converted
    directory, or a digest of the parameters.
    """

    config: ModelConfig
    dtype: mx.Dtype
    rounding: Rounding
    weights: str

    @property
    def form(self) -> StateForm:
        """How the states lay out their rows."""
        return StateForm.of(self.config, self.dtype, self.rounding)

    def make_cache(self) -> DecodeState:
        """An empty state."""
        return DecodeState(self.config, self.dtype, self.rounding)

    def parts(self) -> dict[str, object]:
        """What two kinds must agree in, as values for JSON."""
        return {
            "weights": self.weights,
            "config": self.config.model_dump(mode="json"),
            "dtype": str(self.dtype),
            "rounding": self.rounding,
        }


def digest(parameters: Iterable[tuple[str, mx.array]]) -> str:
    """A name for weights that bear none: SHA-256 of every name, type, shape and byte."""
    sums = hashlib.sha256()
    for name, array in parameters:
        sums.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sums.update(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).data)
    return sums.hexdigest()
