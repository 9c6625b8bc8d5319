"""Directions for steering: what sets one group of prompts apart from another."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

from ds4mlx.engine.prefill import prefill
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.research.steering import Operation, Steering, check_layers, check_operation, check_site
from ds4mlx.store.keys import integer_array

Prompts = Sequence[Sequence[int]]
Method = Literal["mean", "principal"]
Tokens = Literal["last", "all"]


def find_steering(
    model: Model,
    wanted: Prompts,
    others: Prompts,
    *,
    site: str = "ffn.out",
    operation: Operation = "add",
    method: Method = "mean",
    layers: Iterable[int] | None = None,
    tokens: Tokens = "last",
) -> Steering:
    """The direction in every layer from what `others` make of a quantity to what `wanted` make of it.

    wanted, others: prompts as token ids. method: "mean" takes the difference of the two means;
    "principal", of pairs of prompts with the same number in both, the direction in which the pairs'
    differences are largest (their first singular vector), as long as they are on average (root mean
    square), pointing to the wanted. tokens: the last of each prompt, or the mean of all its tokens. Of
    quantities of four streams the mean of the four is taken. layers: all unless given.
    Raises DataError: no prompts, or prompts that make no difference.
    """
    check_site(site)
    check_operation(operation)
    _check_choice("method", method, Method)
    numbers = list(range(model.args.num_hidden_layers) if layers is None else layers)
    check_layers(numbers, model.args)
    ours = _values(model, wanted, site, numbers, tokens)
    theirs = _values(model, others, site, numbers, tokens)
    found = _principal if method == "principal" else _mean
    directions = {n: found(ours[n], theirs[n]) for n in numbers}
    return Steering(operation, site, {n: d for n, d in directions.items() if d.any()})


def separation(
    model: Model, steering: Steering, wanted: Prompts, others: Prompts, tokens: Tokens = "last"
) -> dict[int, float]:
    """How well a direction tells two groups of prompts apart, by layer: in standard deviations.

    The distance of the groups' means along the direction, in units of the mean spread of the two (root
    mean square); of prompts that the direction was not made of. That is large where a layer knows
    of the difference, which need not be where steering does most.
    """
    numbers = steering.layers
    ours = _values(model, wanted, steering.site, numbers, tokens)
    theirs = _values(model, others, steering.site, numbers, tokens)
    apart = {}
    for n, unit in steering.unit().items():
        a, b = ours[n] @ unit, theirs[n] @ unit
        spread = np.sqrt((a.var() + b.var()) / 2)
        apart[n] = float((a.mean() - b.mean()) / max(spread, 1e-12))
    return apart


def _values(
    model: Model, prompts: Prompts, site: str, layers: Sequence[int], tokens: Tokens
) -> dict[int, np.ndarray]:
    """By layer, of each prompt (n, D), float64."""
    _check_choice("tokens", tokens, Tokens)
    given = [integer_array(prompt).tolist() for prompt in prompts]
    if not given or not all(given):
        raise DataError("a direction is made of prompts, of a token or more each")
    each = [_of_prompt(model, prompt, site, layers, tokens) for prompt in given]
    return {n: np.stack([made[n] for made in each]) for n in layers}


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise DataError(f"{name} is {' or '.join(get_args(choices))}, not {value!r}")


def _of_prompt(
    model: Model, prompt: Sequence[int], site: str, layers: Sequence[int], tokens: Tokens
) -> dict[int, np.ndarray]:
    """By layer (D,)."""
    names = {n: f"layers.{n}.{site}" for n in layers}
    positions = [len(prompt) - 1] if tokens == "last" else None
    with model.trace(*names.values(), positions=positions) as t:
        prefill(model, prompt, model.make_cache())
    made = {}
    for n, name in names.items():
        values = np.array(t[name][0].astype(mx.float32)).astype(np.float64)
        made[n] = values.reshape(-1, values.shape[-1]).mean(0)
    return made


def _mean(wanted: np.ndarray, others: np.ndarray) -> np.ndarray:
    return wanted.mean(0) - others.mean(0)


def _principal(wanted: np.ndarray, others: np.ndarray) -> np.ndarray:
    if len(wanted) != len(others):
        raise DataError(f"{len(wanted)} and {len(others)} prompts are not pairs")
    differences = wanted - others
    _, lengths, directions = np.linalg.svd(differences, full_matrices=False)
    direction = directions[0] * lengths[0] / np.sqrt(len(differences))
    return direction if (differences @ direction).sum() >= 0 else -direction
