"""Trained weights as a checkpoint in the official format.

    python -m train.export WEIGHTS CORPUS CHECKPOINT

WEIGHTS holds the bfloat16 files of `train.run`, CORPUS the tokenizer. FP8 matrices get UE8M0 scales
per 128 x 128 tile, experts become FP4 with one scale per 32 inputs.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.checkpoint import load_weights
from train.corpus import SPECIAL
from train.sizes import full_config
from train.weights import Weights

import v4format  # isort: skip - found through train.sizes


def raw_tensors(name: str, kind: str, weight: torch.Tensor) -> list[tuple[str, str, np.ndarray]]:
    """A weight (official name) as it is stored: its codes, then its scales where it has any."""
    values = weight.double().numpy() if kind in ("F8_E4M3", "I8") else weight.numpy()
    if kind in ("F8_E4M3", "I8"):
        quantise = v4format.quantise_fp8 if kind == "F8_E4M3" else v4format.quantise_fp4
        codes, scales = quantise(values)
        codes = codes.view(np.int8) if kind == "I8" else codes
        stem = name.removesuffix("weight")
        return [(name, kind, codes), (f"{stem}scale", "F8_E8M0", scales)]
    if kind == "BF16":
        return [(name, kind, v4format.to_bf16(values))]
    return [(name, kind, values.astype(v4format.NP[kind]))]


def value_of(weights: Weights, name: str) -> torch.Tensor:
    """The value under an official name; experts are stacked in `weights`."""
    if ".experts." not in name:
        return weights[name]
    stem, number, part, _ = name.rsplit(".", 3)
    return weights[f"{stem}.{part}"][int(number)]


def export(weights: Weights, config: dict[str, Any], tokenizer: Path, out: Path) -> None:
    """Write config, shards, index and tokenizer into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    shards = v4format.inventory(config)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        rows = [
            row
            for name, kind, _ in shard
            if kind != "F8_E8M0"
            for row in raw_tensors(name, kind, value_of(weights, name))
        ]
        total += v4format.write_safetensors(str(out / file), rows, {"format": "pt"})
        weight_map.update({name: file for name, _, _ in rows})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    sampling = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True}
    _write(out / "config.json", config)
    _write(out / "model.safetensors.index.json", index)
    _write(out / "tokenizer_config.json", settings)
    _write(out / "generation_config.json", {**sampling, "temperature": 1.0, "top_p": 1.0})
    shutil.copy(tokenizer, out / "tokenizer.json")


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    folder, corpus, checkpoint = map(Path, sys.argv[1:4])
    export(load_weights(folder), full_config(), corpus / "tokenizer.json", checkpoint)
