"""The keys of `config.json`: official ones, and those of transformers 5 for the same values."""

from typing import Any

from ds4mlx.errors import DataError

ROPE_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
# What transformers 5 calls the kinds of attention, by compression ratio.
LAYER_TYPES: dict[str, int] = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}


def official_names(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The values under the official keys, also where the file has them under transformers 5's.

    Raises DataError naming the key where the two contradict each other or one is not understood.
    """
    renamed: list[tuple[str, str, Any]] = []  # official key, the file's key, value
    if values.get("num_local_experts") is not None:
        renamed.append(("n_routed_experts", "num_local_experts", values["num_local_experts"]))
    if values.get("partial_rotary_factor") is not None:
        share = _number(values, "partial_rotary_factor", name)
        dims = int(_number(values, "head_dim", name) * share)
        renamed.append(("qk_rope_head_dim", "partial_rotary_factor", dims))
    renamed += _from_layer_types(values, name)
    found = dict(values)
    for key in ("rope_scaling", "rope_parameters"):
        if values.get(key) is not None:
            renamed += _from_rope(values[key], key, name)
            found.pop(key)
    for official, key, value in renamed:
        if found.get(official) is None:
            found[official] = value
        elif found[official] != value:
            raise DataError(
                f"{name}: {key} says that {official} is {value!r:.60}, which contradicts "
                f"{found[official]!r:.60}"
            )
    return found


def _number(values: dict[str, Any], key: str, name: str) -> float:
    """A number of moderate size, or DataError."""
    value: Any = values.get(key)
    if type(value) not in (int, float) or not abs(value) < 1e6:
        raise DataError(f"{name}: {key} is {value!r:.60}, and a number is expected")
    return value


def _from_layer_types(values: dict[str, Any], name: str) -> list[tuple[str, str, Any]]:
    """Compression ratios and the number of hash layers from lists of a word a layer."""
    renamed: list[tuple[str, str, Any]] = []
    rates = values.get("compress_rates")
    sound = isinstance(rates, dict) and all(LAYER_TYPES.get(k) == v for k, v in rates.items())
    if rates is not None and not sound:
        raise DataError(f"{name}: compress_rates {rates!r:.80} are not supported, only 4 and 128")
    layers = values.get("layer_types")
    if layers is not None:
        if not isinstance(layers, list) or any(layer not in [*LAYER_TYPES] for layer in layers):
            raise DataError(
                f"{name}: layer_types names a layer other than {', '.join(LAYER_TYPES)}"
            )
        ratios, main = [LAYER_TYPES[layer] for layer in layers], values.get("compress_ratios")
        if isinstance(main, list) and main[: len(ratios)] == ratios:
            ratios = main  # the official list goes on with the MTP blocks
        renamed.append(("compress_ratios", "layer_types", ratios))
    mixtures = values.get("mlp_layer_types")
    if mixtures is not None:
        hashed = mixtures.count("hash_moe") if isinstance(mixtures, list) else 0
        plain = int(_number(values, "num_hidden_layers", name)) - hashed
        if mixtures != ["hash_moe"] * hashed + ["moe"] * plain:
            raise DataError(f"{name}: mlp_layer_types must be hash_moe layers, then moe layers")
        renamed.append(("num_hash_layers", "mlp_layer_types", hashed))
    return renamed


def _from_rope(rope: Any, key: str, name: str) -> list[tuple[str, str, Any]]:
    """The parameters of the rotary embedding, flat or by the branches `main` and `compress`."""
    if not isinstance(rope, dict):
        raise DataError(f"{name}: {key} is {rope!r:.60}, and an object is expected")
    if {"main", "compress"} & rope.keys():
        main, compress = (dict(rope.get(branch) or {}) for branch in ("main", "compress"))
        others, branched = sorted(rope.keys() - {"main", "compress"}), True
    else:
        main, compress, others, branched = {}, dict(rope), [], False
    kinds = {str(compress.pop(k)) for k in ("type", "rope_type") if k in compress}
    others += [k for k in ("type", "rope_type") if main.pop(k, "default") != "default"]
    renamed: list[tuple[str, str, Any]] = []
    for branch, official in ((main, "rope_theta"), (compress, "compress_rope_theta")):
        if branch.get("rope_theta") is not None:
            where = official if branched else "rope_theta"
            renamed.append((where, key, branch.pop("rope_theta")))
        branch.pop("partial_rotary_factor", None)
    if compress.pop("attention_factor", 1.0) != 1:
        others.append("attention_factor")
    others += sorted({*main, *compress} - {*ROPE_KEYS})
    if others:
        raise DataError(f"{name}: {key} has {', '.join(others)}, which this model does not have")
    missing = [k for k in ROPE_KEYS if compress.get(k) is None]
    missing += [] if kinds else ["type"]
    if missing and kinds <= {"yarn"}:  # another type is refused as such
        raise DataError(f"{name}: missing {', '.join(f'{key}.{k}' for k in missing)}")
    if len(kinds) > 1:
        raise DataError(f"{name}: {key} has two types, {' and '.join(map(str, sorted(kinds)))}")
    return [*renamed, ("rope_scaling", key, {"type": kinds.pop(), **compress})]
