"""The model's sizes from a GGUF file's metadata: our `config.json`."""

from typing import Any

from ds4mlx.convert.gguf_files import GGUFFiles
from ds4mlx.errors import DataError

ARCHITECTURE = "deepseek4"
# Our key -> the metadata key after `deepseek4.`; all of them are required.
KEYS = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "qk_rope_head_dim": "rope.dimension_count",
    "q_lora_rank": "attention.q_lora_rank",
    "o_lora_rank": "attention.output_lora_rank",
    "o_groups": "attention.output_group_count",
    "sliding_window": "attention.sliding_window",
    "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_hash_layers": "hash_layer_count",
    "routed_scaling_factor": "expert_weights_scale",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "compress_rope_theta": "attention.compress_rope_freq_base",
    "max_position_embeddings": "context_length",
    "hc_mult": "hyper_connection.count",
    "hc_sinkhorn_iters": "hyper_connection.sinkhorn_iterations",
    "hc_eps": "hyper_connection.epsilon",
}
SCALING = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
# What the forward pass takes for granted: metadata key -> its only value.
FIXED = {
    "attention.head_count_kv": 1,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
    "expert_gating_func": 4,
    "rope.scaling.type": "yarn",
    "expert_group_count": 0,
}


def config_values(file: GGUFFiles, drafts: int) -> dict[str, Any]:
    """config.json of a main file beside which there are `drafts` MTP blocks. Raises DataError by key."""
    found = file.text("general.architecture")
    if found != ARCHITECTURE:
        raise DataError(
            f"{file.path}: architecture {found!r} is not supported, only {ARCHITECTURE!r}"
        )
    for key, wanted in FIXED.items():
        value = file.value(f"{ARCHITECTURE}.{key}")
        if value is not None and value != wanted:
            raise DataError(f"{file.path}: {key} is {value!r}, and only {wanted!r} is supported")
    layers = _required(file, "block_count")
    values = {ours: _number(_required(file, key)) for ours, key in KEYS.items()}
    ratios = _required(file, "attention.compress_ratios")
    if not isinstance(layers, int) or not isinstance(ratios, list):
        raise DataError(f"{file.path}: block_count or attention.compress_ratios has a wrong type")
    return {
        "model_type": "deepseek_v4",
        "vocab_size": file.tensor("token_embd.weight").shape[0],
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": drafts,
        "compress_ratios": ratios[: layers + drafts],
        **values,
        "swiglu_limit": _clamp(file),
        "rope_scaling": {"type": "yarn"}
        | {o: _number(_required(file, k)) for o, k in SCALING.items()},
        "bos_token_id": _token(file, "bos"),
        "eos_token_id": _token(file, "eos"),
    }


def _token(file: GGUFFiles, which: str) -> int:
    """The id of the token that begins or ends a text."""
    key = f"tokenizer.ggml.{which}_token_id"
    value = file.value(key)
    if value is None:
        raise DataError(f"{file.path}: metadata {key} is missing")
    return value


def _required(file: GGUFFiles, key: str) -> Any:
    value = file.value(f"{ARCHITECTURE}.{key}")
    if value is None:
        raise DataError(f"{file.path}: metadata {ARCHITECTURE}.{key} is missing")
    if isinstance(value, str):
        raise DataError(f"{file.path}: metadata {ARCHITECTURE}.{key} is text")
    return value


def _number(value: Any) -> Any:
    """Float32 metadata such as 1e-6 as the decimal that was meant."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _clamp(file: GGUFFiles) -> float:
    """The clamp of the experts, one value for all layers."""
    limits: set[float] = set()
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        value = file.value(f"{ARCHITECTURE}.{key}")
        limits |= set(value if isinstance(value, list) else [] if value is None else [value])
    if len(limits) != 1:
        raise DataError(f"{file.path}: swiglu_clamp_exp has values {limits}, one for all is needed")
    return _number(limits.pop())
