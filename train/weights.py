"""The trained weights: their names, first values, and the forms that a step computes with."""

from typing import Any

import torch
from torch import Tensor

from train.rounding import fp4_groups, fp8_tiles, straight_through

Weights = dict[str, Tensor]


def inventory(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Official name (experts stacked, without number and `.weight`) -> stored type and shape."""
    import v4format

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, kind, shape in (t for shard in v4format.inventory(config) for t in shard):
        if kind == "F8_E8M0":
            continue
        if ".experts." in name:
            stem, number, part, _ = name.rsplit(".", 3)
            if number == "0":
                wide = (config["n_routed_experts"], shape[0], 2 * shape[1])
                found[f"{stem}.{part}"] = (kind, wide)
        else:
            found[name] = (kind, tuple(shape))
    return found


def first_values(config: dict[str, Any], seed: int) -> Weights:
    """Random weights to begin from, float32 (hash tables int64), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (kind, shape) in inventory(config).items():
        leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
        made[name] = _first_value(config, name, leaf, kind, shape, generator)
    return made


def _first_value(
    config: dict[str, Any], name: str, leaf: str, kind: str, shape: tuple[int, ...], generator: Any
) -> Tensor:
    if leaf == "tid2eid":
        scores = torch.rand(shape[0], config["n_routed_experts"], generator=generator)
        return scores.argsort(1)[:, : shape[1]].contiguous()
    if leaf.endswith("norm"):
        return torch.ones(shape)
    if leaf in ("attn_sink", "bias"):
        return torch.zeros(shape)
    normal = torch.randn(shape, generator=generator)
    if leaf.startswith("hc_"):
        return _hyper_connection(config, name, leaf, normal)
    if leaf == "ape":
        return 0.1 * normal
    if leaf == "embed":
        return 0.5 * normal
    gain = {"wo_b": 0.5, "w2": 0.5, "head": 0.5, "wgate": 0.3}.get(leaf, 1.0)
    return gain * normal * shape[-1] ** -0.5


def _hyper_connection(config: dict[str, Any], name: str, leaf: str, normal: Tensor) -> Tensor:
    """Each block reads mostly one stream, writes to all, and keeps the streams apart."""
    n, what = config["hc_mult"], leaf.rsplit("_", 1)[1]
    if what == "fn":
        return normal * normal.shape[-1] ** -0.5
    if what == "scale":
        return torch.full_like(normal, 0.1)
    base = 0.2 * normal
    if len(base) == n:
        return base - 1.1
    parts = name.split(".")
    block = int(parts[1]) if parts[0] == "layers" else 0
    reads = (2 * block + ("ffn" in leaf)) % n
    base[:n] += -2.0
    base[reads] += 3.5
    base[2 * n :] += 3.0 * torch.eye(n).flatten()
    return base


def is_trained(name: str) -> bool:
    """Whether gradients change a weight; routers' biases follow the load instead."""
    return not name.endswith(("tid2eid", "gate.bias"))


def as_computed(
    weights: Weights, config: dict[str, Any], dtype: torch.dtype, quantised: bool
) -> Weights:
    """The weights as a step multiplies by them: matrices in `dtype`, rounded as stored if wanted."""
    kinds, ready = inventory(config), {}
    for name, weight in weights.items():
        kind = kinds[name][0]
        if quantised:
            weight = stored(weight, kind)
        wide = kind in ("F32", "I64") or name.endswith("norm.weight")
        ready[name] = weight if wide else weight.to(dtype)
    return ready


def stored(weight: Tensor, kind: str) -> Tensor:
    """A weight as the checkpoint's type `kind` holds it; gradients pass straight through."""
    if kind == "F8_E4M3":
        return fp8_tiles(weight)
    if kind == "I8":
        return fp4_groups(weight)
    if kind == "BF16":
        return straight_through(weight, weight.bfloat16().float())
    return weight
