"""What training leaves on disk: bfloat16 weights in small files, and states to go on from."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]

FILE_BYTES = 15 << 20
STATE, LOG = "state.pt", "log.json"


def save_weights(out: Path, weights: Weights) -> None:
    """Write `OUT/weights-N.safetensors`: float tensors as bfloat16, small float32 ones as they are."""
    files: list[Weights] = [{}]
    size = 0
    for name, weight in weights.items():
        kept = _kept(name, weight.detach())
        if size + kept.nbytes > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = kept
        size += kept.nbytes
    for number, tensors in enumerate(files):
        save_file(tensors, out / f"weights-{number}.safetensors")


def _kept(name: str, weight: torch.Tensor) -> torch.Tensor:
    if not weight.is_floating_point():
        return weight.to(torch.int16).cpu().contiguous()
    small = weight.ndim == 1 or "hc_" in name or name.endswith("ape")
    return weight.to(torch.float32 if small else torch.bfloat16).cpu().contiguous()


def load_weights(folder: Path) -> Weights:
    """What `save_weights` wrote, float32 (hash tables int64)."""
    found: Weights = {}
    for file in sorted(folder.glob("weights-*.safetensors")):
        found.update(load_file(file))
    if not found:
        raise FileNotFoundError(f"{folder}: no weights-*.safetensors")
    return {n: w.float() if w.is_floating_point() else w.long() for n, w in found.items()}


def save_state(out: Path, trainer: Any, log: list[dict[str, float]]) -> None:
    """Write weights and optimiser, so that a run can go on."""
    optimiser = trainer.optimiser
    state = {
        "weights": {n: w.detach() for n, w in trainer.weights.items()},
        "momentum": optimiser.momentum,
        "adam": optimiser.adam.state_dict(),
    }
    partial = out / f"{STATE}.partial"
    torch.save(state, partial)
    partial.replace(out / STATE)
    (out / LOG).write_text(json.dumps(log))


def load_state(out: Path, trainer: Any) -> list[dict[str, float]]:
    """Put back the state in `out`, if there is one; returns the log so far."""
    if not (out / STATE).exists():
        return []
    state = torch.load(out / STATE, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, weight in state["weights"].items():
            trainer.weights[name].copy_(weight)
        for name, momentum in state["momentum"].items():
            trainer.optimiser.momentum[name].copy_(momentum)
    trainer.optimiser.adam.load_state_dict(state["adam"])
    return json.loads((out / LOG).read_text())
