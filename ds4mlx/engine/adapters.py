"""Adapters (LoRA): low-rank changes of matrices, trained beside weights that stay as they are stored."""

from collections.abc import Iterable

from ds4mlx.errors import DataError
from ds4mlx.model.linear import Projection
from ds4mlx.model.model import Model

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
    """Give matrices of a model an adapter each, and freeze all else: what is trained is scale * B . A.

    layers: numbers of the layers whose matrices get one, all unless given. routed: also the routed
    experts, whose projections get one that all experts of a layer share. keys: names of matrices
    within a layer, such as `attn.wq_a`, in place of the projections of attention and the shared
    expert. DataError: no such layer or matrix.
    """
    count = len(model.layers)
    numbers = range(count) if layers is None else sorted(set(layers))
    wanted = tuple(keys) if keys is not None else ATTENTION + SHARED + (ROUTED if routed else ())
    found = projections(model)
    names = [f"layers.{number}.{key}" for number in numbers for key in wanted]
    for name in names:
        if name not in found:
            raise DataError(f"{name}: the model has no such matrix that can be adapted")
    model.freeze()
    for name in names:
        found[name].to_lora(rank, scale, dropout)


def projections(model: Model) -> dict[str, Projection]:
    """The matrices that can have an adapter, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Projection)}
