"""Adapters (LoRA): low-rank changes of matrices, trained beside weights that stay as they are stored."""

import os
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx

from ds4mlx.durable import replacing, write_whole
from ds4mlx.errors import DataError
from ds4mlx.model.linear import projections, shapes
from ds4mlx.model.model import Model
from ds4mlx.weights.adapter import (
    ADAPTER_CONFIG,
    ADAPTERS,
    PARTS,
    Adapter,
    Pair,
    adapter_config,
    read_adapter,
)

# What is adapted unless told: of each layer the projections of attention, and the shared expert.
ATTENTION = tuple(f"attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"))
SHARED = tuple(f"ffn.shared_experts.{name}" for name in ("w1", "w2", "w3"))
ROUTED = tuple(f"ffn.experts.{name}" for name in ("w1", "w2", "w3"))


def add_lora(
    model: Model,
    rank: int = 8,
    scale: float = 20.0,
    dropout: float = 0.0,
    *,
    layers: Iterable[int] | None = None,
    routed: bool = False,
    keys: Iterable[str] | None = None,
) -> None:
    """Give matrices of a model an adapter each, and freeze all else: W becomes W + scale * (A . B)^T.

    Nothing changes before the adapters are trained. layers: numbers of the layers whose matrices get
    one, all unless given. routed: also the routed experts; all experts of a layer share one for each
    projection. keys: names of matrices within a layer, such as `attn.wq_a`, in place of the
    projections of attention and the shared expert. DataError: no such layer or matrix, or the model
    has adapters already.
    """
    wanted = tuple(keys) if keys is not None else ATTENTION + SHARED + (ROUTED if routed else ())
    numbers = range(len(model.layers)) if layers is None else sorted(set(layers))
    names, found = [f"layers.{n}.{key}" for n in numbers for key in wanted], projections(model)
    for name in names:
        if name not in found:
            raise DataError(f"{name}: the model has no such matrix that can be adapted")
    if rank < 1 or not 0 <= dropout < 1:
        raise DataError("the rank of an adapter is 1 or more, and its dropout from 0 to below 1")
    _freeze(model)
    for name in names:
        found[name].to_lora(rank, scale, dropout)


def load_adapter(model: Model, path: str | Path) -> None:
    """Give a model the adapters in a directory, of `save_adapter` or of mlx-lm's tools, and freeze all else.

    Raises DataError, naming file and tensor, if they are damaged, not finite, or of another model; and
    if the model has adapters already.
    """
    attach(model, read_adapter(path, shapes(model)))


def attach(model: Model, adapter: Adapter) -> None:
    """Give a model an adapter that was read for it."""
    _freeze(model)
    found = projections(model)
    for name, pair in adapter.pairs.items():
        found[name].to_lora(adapter.rank, adapter.scale, adapter.dropout)
        found[name].lora_a, found[name].lora_b = pair


def save_adapter(model: Model, path: str | Path) -> None:
    """Write a model's adapters into a directory, in mlx-lm's form; what was there before is replaced.

    DataError: the model has none, or they differ in rank, scale or dropout, for which the form has no
    place.
    """
    folder = Path(path).expanduser()
    adapter = _adapter_of(model, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{os.getpid()}.{ADAPTERS}"
        with replacing(folder / ADAPTERS, aside):
            arrays = {
                f"{name}.{part}": array
                for name, pair in adapter.pairs.items()
                for part, array in zip(PARTS, pair, strict=True)
            }
            mx.save_safetensors(str(aside), arrays, {"format": "mlx"})
        write_whole(folder / ADAPTER_CONFIG, adapter_config(adapter, len(model.layers)))
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror}") from error


def remove_lora(model: Model) -> None:
    """Take a model's adapters away; its weights are what they were."""
    for matrix in projections(model).values():
        if matrix.adapted:
            matrix.drop_lora()


def _freeze(model: Model) -> None:
    """Freeze all parameters. Raises DataError if a matrix has an adapter."""
    if any(matrix.adapted for matrix in projections(model).values()):
        raise DataError("the model has adapters already; `remove_lora` takes them away")
    model.freeze()


def _adapter_of(model: Model, folder: Path) -> Adapter:
    """The adapters of a model as one."""
    found = {name: m for name, m in projections(model).items() if m.adapted}
    alike = {(len(m.lora_b), m.scale, m.dropout) for m in found.values()}
    if len(alike) != 1:
        cause = "differ in rank, scale or dropout" if found else "are none"
        raise DataError(f"{folder}: the model's adapters {cause}, so they cannot be saved")
    ((rank, scale, dropout),) = alike
    return Adapter(
        folder, rank, scale, dropout, {n: Pair(m.lora_a, m.lora_b) for n, m in found.items()}
    )
