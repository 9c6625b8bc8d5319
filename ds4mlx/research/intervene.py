"""Changing quantities of a running model: `model.intervene`."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.model.batch import Batch, Span
from ds4mlx.model.model import Model
from ds4mlx.model.taps import listening
from ds4mlx.research.places import Calls, Layouts, Part, Where, chosen_positions
from ds4mlx.research.sites import matching, sites
from ds4mlx.state.changes import NAMELESS

# A change: of a value (B, L, ...), to what fits its shape and is rounded to its type.
Edit = Callable[[mx.array, Where], Any]

EXPERTS, NEAR, FAR = "ffn.router.experts", "attn.weights.positions", "attn.weights.rows"
CHOSEN, CHOSEN_OF = "attn.indexer.chosen", 4  # tokens that a row has where rows are chosen
# What has to be known of a quantity, made before it in the same layer, to say what it is about.
ABOUT = {
    "ffn.router.weights": EXPERTS,
    "ffn.experts.hidden": EXPERTS,
    "ffn.experts.each": EXPERTS,
    "attn.window_visible": NEAR,
    "attn.weights.window": NEAR,
    "attn.weights.compressed": FAR,
}
# Whose last axis is about all compressed rows, in their order.
EVERY_ROW = ("attn.visible", "attn.indexer.scores")


def intervene(
    model: Model, changes: Mapping[str, Any], positions: Iterable[int] | None
) -> contextlib.AbstractContextManager[None]:
    """See `Model.intervene`."""
    known, edits = sites(model), {}
    for pattern, change in changes.items():
        names = [name for name in matching((pattern,), known) if not known[name].fixed]
        if not names:
            raise DataError(f"{pattern!r} only says what other quantities are about: change those")
        for name in names:
            edits.setdefault(name, []).append(change if callable(change) else _given(change))
    return listening(_Changes(model, edits, positions))


def _given(values: Any) -> Edit:
    """What puts given values in the place of others."""
    array = values if isinstance(values, mx.array) else mx.array(np.asarray(values))
    return lambda value, where: array


def about(name: str) -> str | None:
    """The name of what says which experts or rows a quantity is about, if it takes that."""
    end = next((end for end in ABOUT if name.endswith(end)), None)
    return name.removesuffix(end) + ABOUT[end] if end else None


class _Changes(Calls):
    """Puts in the place of quantities what functions make of them."""

    changes = NAMELESS

    def __init__(self, model: Model, edits: dict[str, list[Edit]], positions: Iterable[int] | None):
        self._about = {name: said for name in edits if (said := about(name))}
        super().__init__(model, {*edits, *self._about.values()}, sites(model))
        self._edits, self._asked, self._layouts = edits, chosen_positions(positions), Layouts(model)
        self._said: dict[str, list[Part]] = {}

    def begins(self, batch: Batch) -> None:
        """Nothing is said yet of this call's quantities."""
        super().begins(batch)
        self._said = {}

    def take(self, name: str, value: mx.array, span: Span | None) -> mx.array:
        """What the functions make of the value, one after the other."""
        usual = self._layouts.values(name, value)
        parts = self.parts(name, usual, span)
        made = [self._changed(name, number, part) for number, part in enumerate(parts)]
        same = all(new is part.value for new, part in zip(made, parts, strict=True))
        if not same:
            self._check_numbers(name, made, span)
            rows = [new.flatten(0, 1) for new in made]
            usual = rows[0] if len(rows) == 1 else mx.concatenate(rows)
            parts = [
                Part(p.sequences, p.positions, new) for p, new in zip(parts, made, strict=True)
            ]
        if name in self._about.values():
            self._said[name] = parts
        return value if same else self._layouts.laid_out(name, usual, value)

    def _check_numbers(self, name: str, made: list[mx.array], span: Span | None) -> None:
        """DataError for experts or rows that are not there: some are read without another look."""
        if name.endswith(EXPERTS):
            least, most = 0, self.model.args.n_routed_experts - 1
        elif name.endswith(CHOSEN) and span is not None:
            least, most = -1, span.step.end // CHOSEN_OF - 1
        else:
            return
        for value in made:
            if value.size and not ((value >= least) & (value <= most)).all().item():
                found = np.unique(np.array(value))
                wrong = found[(found < least) | (found > most)][:5].tolist()
                raise DataError(f"{name} has numbers from {least} to {most} here, not {wrong}")

    def _changed(self, name: str, number: int, part: Part) -> mx.array:
        """The new value (B, L, ...) of a part, or the same array."""
        value, asked = part.value, self._asked(part.positions)
        if not value.size or not asked.any():
            return value
        where = self._where(name, number, part)
        for edit in self._edits.get(name, ()):
            value = _fits(name, edit(value, where), value)
        if value is part.value or asked.all():
            return value
        mask = mx.array(asked).reshape(*asked.shape, *[1] * (value.ndim - 2))
        return mx.where(mask, value, part.value)

    def _where(self, name: str, number: int, part: Part) -> Where:
        """Which tokens, experts and rows the part is of."""
        places = mx.array(part.positions.astype(np.int32)), mx.array(part.sequences)
        said = self._said[self._about[name]][number].value if name in self._about else None
        place = Where(name, *places, self.model.args.n_routed_experts)
        if said is not None and self._about[name].endswith(EXPERTS):
            return replace(place, experts=said)
        if name.endswith(EVERY_ROW):
            said = mx.arange(part.value.shape[-1])[None, None]
        return replace(place, rows=said)


def _fits(name: str, new: Any, old: mx.array) -> mx.array:
    """A new value in the old one's shape and type. DataError: it is none."""
    if new is old:
        return old
    try:
        new = new if isinstance(new, mx.array) else mx.array(np.asarray(new))
        return mx.broadcast_to(new, old.shape).astype(old.dtype)
    except (TypeError, ValueError, RuntimeError):  # the last from MLX, for what is no number
        shape = getattr(new, "shape", None) or type(new).__name__
        raise DataError(f"{name} must stay {old.shape}, and cannot become {shape}") from None
