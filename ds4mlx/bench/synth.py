"""Models of the real shapes with random weights in the real formats, made on the device.

They answer nothing; they take the memory and the time that the real ones would.
"""

import math
from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.convert.recipes import expert_format
from ds4mlx.custom_kernels.random_weights import random_planes, random_words
from ds4mlx.engine.machine import check_fits
from ds4mlx.errors import DataError
from ds4mlx.formats import DTYPES, FORMATS
from ds4mlx.model.linear import Matrix
from ds4mlx.model.model import Model
from ds4mlx.weights.directory import planes
from ds4mlx.weights.inventory import Entry, inventory

Like = Literal["flash", "pro"]
# `keep` stands for the formats of ds4's q2 GGUF file.
RECIPES = ("official", "q2", "q2-q4", "q4", "keep")
SCRATCH = 4  # arrays as large as a weight that are there while it is made, itself not counted
PRO = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
    "compress_ratios": (128, 128, *(4, 128) * 29, 4, 0),
}


def config_like(like: Like, layers: int | None = None) -> ModelConfig:
    """Flash's or Pro's sizes, without an MTP block; with `layers`, only the first so many layers.

    Raises DataError if there are not so many.
    """
    whole = ModelConfig(**(PRO if like == "pro" else {}))
    count = whole.num_hidden_layers if layers is None else layers
    if not 1 <= count <= whole.num_hidden_layers:
        raise DataError(f"{like} has {whole.num_hidden_layers} layers, not {count}")
    return whole.model_copy(
        update={
            "num_hidden_layers": count,
            "num_nextn_predict_layers": 0,
            "num_hash_layers": min(whole.num_hash_layers, count),
            "compress_ratios": whole.compress_ratios[:count],
        }
    )


def format_of(recipe: str, entry: Entry, config: ModelConfig) -> str:
    """The format that a recipe stores an entry in."""
    if entry.kind == "ids":
        return "i32"
    if entry.kind == "exact" or (recipe == "keep" and len(entry.shape) == 1):
        return "f32"
    if entry.kind == "experts":
        return "mxfp4" if recipe == "official" else expert_format(recipe, entry, config)
    if recipe != "keep":
        return "mxfp8" if entry.kind == "matrix" else "bf16"
    packed = entry.kind == "matrix" and entry.component != "indexers"
    return "q8_0" if packed or entry.name == "head.weight" else "f16"


def random_entry(entry: Entry, stored: str, config: ModelConfig, seed: int) -> dict[str, mx.array]:
    """Planes of one entry: weights of deviation 1 / sqrt(in), norms near 1, small biases."""
    key = mx.random.key(seed)
    if entry.kind == "ids":
        return {"weight": _table(entry.shape, config.n_routed_experts, seed)}
    dtype = DTYPES[FORMATS[stored].layout["weight"][0]]
    if entry.kind == "plain" and len(entry.shape) == 1:
        return {"weight": (1 + 0.1 * mx.random.normal(entry.shape, key=key)).astype(dtype)}
    if entry.kind == "exact" and not entry.name.endswith(".fn"):
        return {"weight": (0.1 * mx.random.normal(entry.shape, key=key)).astype(dtype)}
    return random_planes(stored, entry.shape, seed)


def _table(shape: tuple[int, ...], experts: int, seed: int) -> mx.array:
    """Experts of every token id, all different: int32 (vocab, k)."""
    first = random_words((shape[0], 1), seed) % experts
    step = math.gcd(experts, 64) + 1  # steps of it meet k experts before they come round
    return ((first + step * mx.arange(shape[1], dtype=mx.uint32)) % experts).astype(mx.int32)


def entries(config: ModelConfig) -> list[Entry]:
    """Every weight of a model, in file order."""
    return [entry for listed in inventory(config).values() for entry in listed]


def entry_bytes(entry: Entry, stored: str) -> int:
    """Bytes of an entry's planes."""
    return sum(math.prod(p.shape) * DTYPES[p.dtype].size for p in planes(entry, stored))


def weight_bytes(config: ModelConfig, recipe: str) -> int:
    """Bytes of all weights of a model."""
    return sum(entry_bytes(e, format_of(recipe, e, config)) for e in entries(config))


def check_memory(config: ModelConfig, recipe: str, kept: bool = True) -> None:
    """Raises DataError if there is not the memory to make a model, or without `kept` its parts."""
    sizes = [entry_bytes(e, format_of(recipe, e, config)) for e in entries(config)]
    scratch = SCRATCH * max(sizes)
    layers = config.num_hidden_layers
    what = f"{'a model' if kept else 'writing a model'} of {layers} layers as {recipe}"
    check_fits(what, scratch + (sum(sizes) if kept else 0))


def synth_model(
    config: ModelConfig,
    recipe: str,
    dtype: mx.Dtype = mx.bfloat16,
    on_entry: Callable[[int, int], None] | None = None,
) -> Model:
    """A model in memory. `on_entry` is told (weights made, weights in all). Raises DataError."""
    check_recipe(recipe)
    model, listed = Model(config, dtype), entries(config)
    modules = dict(model.named_modules())
    for done, entry in enumerate(listed):
        stored, module = format_of(recipe, entry, config), modules[entry.module]
        made = random_entry(entry, stored, config, seed=done + 1)
        if isinstance(module, Matrix):
            module.store(stored)
            for plane, array in made.items():
                module[plane] = array
            mx.eval(list(made.values()))
        else:
            module[entry.name.rpartition(".")[2]] = made["weight"]
            mx.eval(made["weight"])
        mx.clear_cache()  # scratch of making a large plane
        if on_entry is not None:
            on_entry(done + 1, len(listed))
    return model


def check_recipe(recipe: str) -> None:
    """Raises DataError for a recipe that there is not."""
    if recipe not in RECIPES:
        raise DataError(f"there is no recipe {recipe!r}; there are: {', '.join(RECIPES)}")
