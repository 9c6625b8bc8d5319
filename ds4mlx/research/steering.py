"""Steering: a direction for each of some layers, added to a quantity or projected out of it."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.model.batch import Batch, Span
from ds4mlx.model.model import Model
from ds4mlx.model.taps import Listener, listening
from ds4mlx.research.edits import addition, projection

Operation = Literal["add", "project"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
# Quantities of a block with hidden_size channels for every token, or every stream of it.
SITES = (
    *("hc_attn.streams", "hc_attn.collapsed", "attn.in", "attn.out", "attn.streams"),
    *("hc_ffn.streams", "hc_ffn.collapsed", "ffn.in", "ffn.shared_experts.out"),
    *("ffn.experts.out", "ffn.out", "streams"),
)
LARGEST = 1e30


@dataclass(frozen=True, eq=False)
class Steering:
    """What is done with a direction, where, and how much.

    operation: "add" adds scale times the direction, whose length counts. "project" takes scale times
    the part along it, whose length does not count, out of the value: 1 leaves nothing of it, 2 mirrors
    it, and less than 0 makes more of it. site: the quantity of a layer, one of SITES; where it is of
    all four streams each of them is changed alike. directions: by layer, from 0, float32 (D,). scale:
    how much, unless somebody says otherwise. Raises DataError for what is none.
    """

    operation: Operation
    site: str
    directions: Mapping[int, np.ndarray] = field(repr=False)
    scale: float = 1.0

    def __post_init__(self):
        check_operation(self.operation)
        check_site(self.site)
        check_scale(self.scale)
        made = {n: np.array(v, np.float32) for n, v in sorted(self.directions.items())}
        object.__setattr__(self, "directions", made)
        if not made:
            raise DataError("there is no direction but 0 for any layer")
        for layer, direction in made.items():
            _check(layer, direction, len(next(iter(made.values()))))

    @property
    def layers(self) -> list[int]:
        """Those that have a direction."""
        return list(self.directions)

    def check(self, config: ModelConfig) -> None:
        """DataError unless a model has these layers, of this width."""
        width = len(next(iter(self.directions.values())))
        if width != config.hidden_size:
            raise DataError(
                f"directions of {width} channels are not of a model of {config.hidden_size}"
            )
        check_layers(self.directions, config)

    def checked(self, scale: float | None) -> float:
        """A scale, or the steering's own for None. DataError: it is not finite."""
        check_scale(scale := self.scale if scale is None else scale)
        return scale

    def only(self, layers: Iterable[int]) -> "Steering":
        """The same for some of its layers. DataError: it has none of them."""
        asked = list(layers)
        kept = {n: d for n, d in self.directions.items() if n in asked}
        if not kept:
            raise DataError(
                f"there are directions for {_some(self.directions)}, not for {_some(asked)}"
            )
        return Steering(self.operation, self.site, kept, self.scale)

    def unit(self) -> dict[int, np.ndarray]:
        """The directions with a length of 1, float32 (D,)."""
        wide = {layer: d.astype(np.float64) for layer, d in self.directions.items()}
        return {layer: (d / np.linalg.norm(d)).astype(np.float32) for layer, d in wide.items()}

    def name(self, scale: float) -> str:
        """A name that only the same steering has, by as much."""
        sums = hashlib.sha256(f"{self.operation} {self.site} {float(scale)!r}".encode())
        for layer, direction in self.directions.items():
            sums.update(f"\n{layer} ".encode() + direction.astype("<f4").tobytes())
        return f"steering:{sums.hexdigest()}"


def check_operation(operation: str) -> None:
    """DataError unless it is one."""
    if operation not in OPERATIONS:
        raise DataError(f"the operation is {' or '.join(OPERATIONS)}, not {operation!r}")


def check_site(site: str) -> None:
    """DataError unless steering can be done there."""
    if site not in SITES:
        raise DataError(f"steering is done at {', '.join(SITES)}, and not at {site!r}")


def check_scale(scale: float) -> None:
    """DataError unless it is a number that float32 has room for."""
    if not abs(scale) < LARGEST:
        raise DataError(f"the scale must be finite, and less than {LARGEST:g}, not {scale}")


def check_layers(layers: Iterable[int], config: ModelConfig) -> None:
    """DataError unless a model has them."""
    for layer in layers:
        if not 0 <= layer < config.num_hidden_layers:
            raise DataError(f"the model has layers 0 to {config.num_hidden_layers - 1}, no {layer}")


def _check(layer: int, direction: np.ndarray, width: int) -> None:
    if direction.shape != (width,):
        raise DataError(f"the direction of layer {layer} is {direction.shape}, not ({width},)")
    if not np.isfinite(direction).all():
        raise DataError(f"the direction of layer {layer} has values that are not finite")
    if layer < 0 or not direction.any():
        raise DataError(
            f"the direction of layer {layer} is 0" if layer >= 0 else f"no layer {layer}"
        )


def _some(layers: Iterable[int]) -> str:
    numbers = [str(n) for n in layers]
    shown = numbers if len(numbers) < 10 else [*numbers[:4], "...", *numbers[-4:]]
    return f"layer {', '.join(shown)}" if shown else "no layer"


def steer(
    model: Model, steering: Steering, scale: float | None, layers: Iterable[int] | None
) -> contextlib.AbstractContextManager[None]:
    """See `Model.steer`."""
    steering.check(model.args)
    chosen = steering
    if layers is not None:
        check_layers(layers := list(layers), model.args)
        chosen = steering.only(layers)
    strength = chosen.checked(scale)
    return listening(_Steered(model, chosen, strength)) if strength else contextlib.nullcontext()


class _Steered(Listener):
    """Changes one quantity of some layers, in every call of one model."""

    steady = True

    def __init__(self, model: Model, steering: Steering, scale: float):
        self.changes = steering.name(scale)
        self._model, self._ours = model, False
        self._edits = {
            f"layers.{layer}.{steering.site}": _edit(steering.operation, direction, scale)
            for layer, direction in steering.directions.items()
        }

    def __eq__(self, other: object) -> bool:
        """Whether another one does the same to the same model."""
        if not isinstance(other, _Steered):
            return False
        return other._model is self._model and other.changes == self.changes

    def __hash__(self) -> int:
        return hash(self.changes)

    def begins(self, batch: Batch) -> None:
        """Listen if it is a call of this model, whose tables no other has."""
        self._ours = batch.tables is self._model._rotary

    def ends(self) -> None:
        """What is computed between two calls stays as it is."""
        self._ours = False

    def wants(self, name: str) -> bool:
        """Whether it is the quantity of a steered layer."""
        return self._ours and name in self._edits

    def take(self, name: str, value: mx.array, span: Span | None) -> mx.array:
        """The steered value, computed in float32."""
        return self._edits[name](value).astype(value.dtype)


def _edit(
    operation: Operation, direction: np.ndarray, scale: float
) -> Callable[[mx.array], mx.array]:
    """float32 (..., D) of values (..., D)."""
    if operation == "add":
        return addition(mx.array(np.float32(scale) * direction))
    return projection(mx.array(direction), scale)
