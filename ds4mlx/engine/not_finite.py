"""Where values stop being finite: found by a second pass, without kernels, that stops there."""

from collections.abc import Sequence

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.engine.room import PREFILL_STEP
from ds4mlx.model.batch import Span
from ds4mlx.model.model import Model
from ds4mlx.model.taps import Listener, listening
from ds4mlx.state.decode_state import DecodeState


class _Stop(Exception):
    """Raised at the first quantity that is not finite, or at the end of the pass."""


class _Watch(Listener):
    """Stops a pass at the first streams, embeddings or logits that are not finite.

    Logits, the last there is to see, always stop it, so that the state stays before them.
    """

    def __init__(self, model: Model):
        self._places = {"embed": "the embedding"}
        self._places |= {f"layers.{i}.streams": f"layer {i}" for i in range(len(model.layers))}
        self._places["logits"] = "the head"
        self.place: str | None = None

    def wants(self, name: str) -> bool:
        """The embeddings, the streams after each layer, and the logits."""
        return name in self._places

    def take(self, name: str, value: mx.array, span: Span | None) -> mx.array:
        """The same value, if the pass goes on."""
        finite = bool(mx.all(mx.isfinite(value)))
        if not finite:
            self.place = self._places[name]
        if not finite or name == "logits":
            raise _Stop
        return value


def blame(model: Model, tokens: Sequence[int], state: DecodeState) -> str:
    """Which part of a model makes values that are not finite of these tokens, as a clause.

    `state` is the one before the tokens; it moves on by less than them, by chunks that are sound.
    """
    used, watch = dispatch.in_use(), _Watch(model)
    try:
        with dispatch.plain_operations(), listening(watch):
            for start in range(0, len(tokens), PREFILL_STEP):
                chunk = mx.array([list(tokens[start : start + PREFILL_STEP])])
                if start + PREFILL_STEP < len(tokens):
                    mx.eval(model.streams(chunk, state)[:, -1:])
                else:
                    model.last_logits(chunk, state)
    except _Stop:
        pass
    if watch.place is not None:
        return f"{watch.place} is the first part whose values are not finite"
    if used:
        return "without kernels they are finite, so set DS4MLX_KERNELS=0"
    return "a second pass over the same tokens gave finite ones"
