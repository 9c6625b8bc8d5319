#!/usr/bin/env python3
"""Write a small random DeepSeek-V4 checkpoint in the official Hugging Face format.

    python make_checkpoint.py --out DIR --seed S [--preset tiny] [--set key=value ...]

Needs NumPy only (and `tokenizers` for the optional tokenizer.json).  Same
config keys, tensor names, dtypes, scale layout and shard layout as
DeepSeek-V4-Flash; only the dimensions are small and the values random.
The values are chosen so that every mechanism of the model has a visible effect
on the logits: sinks, router biases, SwiGLU clamps, block scales, norms, HC
mixing, the window, both compressors and the indexer's selection.
"""

import argparse
import json
import os
import zlib

import numpy as np

import v4format as fmt

FLASH = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 43,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
    "compress_rope_theta": 160000,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
}

# The last entry of compress_ratios belongs to the MTP block.
PRESETS = {
    # smallest that still has each of the three layer kinds twice
    "tiny": dict(
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_hash_layers=3,
        compress_ratios=[0, 0, 4, 128, 4, 128, 0],
        num_attention_heads=4,
        head_dim=128,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=128,
        index_n_heads=8,
        index_topk=8,
        sliding_window=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        vocab_size=288,
    ),
    # not shipped (large): real head sizes, for engines whose kernels are specialised to head_dim 512
    "hd512": dict(
        hidden_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=8,
        num_hash_layers=3,
        compress_ratios=[0, 0, 4, 128, 4, 128, 4, 128, 0],
        num_attention_heads=8,
        head_dim=512,
        q_lora_rank=256,
        o_groups=2,
        o_lora_rank=256,
        index_n_heads=8,
        index_topk=32,
        sliding_window=128,
        n_routed_experts=16,
        num_experts_per_tok=6,
        vocab_size=1024,
    ),
    # not shipped: Flash's head, index, window and selection counts with a narrow trunk
    "flashlike": dict(
        hidden_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=8,
        num_hash_layers=3,
        compress_ratios=[0, 0, 4, 128, 4, 128, 4, 128, 0],
        num_attention_heads=64,
        n_routed_experts=32,
        vocab_size=2048,
    ),
}


def rng_for(seed, name):
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def rough_matrix(rng, shape, std):
    """Gaussian matrix whose scale varies by row, by 128-column block and by 32-column group."""
    o, i = shape
    w = rng.standard_normal(shape) * std
    w *= np.exp(0.15 * rng.standard_normal((o, 1)))
    for width, spread in ((128, 0.3), (32, 0.25)):
        w *= np.repeat(
            np.exp(spread * rng.standard_normal((fmt.ceil_div(o, 128), fmt.ceil_div(i, width)))),
            128,
            axis=0,
        )[:o].repeat(width, axis=1)[:, :i]
    return w * (std / w.std())


# Standard deviation of y = W x for x of unit variance, by the last part of the name.
GAIN = {
    "wq_a": 1.0,
    "wq_b": 1.0,
    "wkv": 1.0,
    "wo_a": 2.0,
    "wo_b": 0.9,
    "wgate": 1.3,
    "weights_proj": 1.0,
    "e_proj": 1.0,
    "h_proj": 1.0,
    "gate": 1.6,
    "w1": 4.0,
    "w3": 4.0,
    "w2": 0.065,
    "head": 2.0,
}


def values(cfg, seed, name, dtype, shape):
    rng = rng_for(seed, name)
    parts = name.split(".")
    leaf = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
    hc = cfg["hc_mult"]
    if name == "embed.weight":
        return rng.standard_normal(shape) + common_direction(cfg, seed)
    if leaf.endswith("norm"):
        base = {"kv_norm": 1.4, "q_norm": 1.1}.get(leaf, 1.0)
        if name.endswith("attn.compressor.norm.weight"):  # few rows compete with a whole window
            base = (
                1.5
                if cfg["compress_ratios"][int(parts[1])] == 4
                else 2.0
                if cfg["sliding_window"] < 64
                else 3.0
            )
        if ".indexer." in name:
            base = hot_channels(cfg, seed, name)
        return base * np.exp(0.25 * rng.standard_normal(shape))
    if leaf == "attn_sink":
        return rng.normal(np.log(cfg["sliding_window"]) - 0.3, 1.0, shape)
    if leaf == "ape":
        return rng.normal(0.0, 0.8, shape)
    if leaf == "tid2eid":
        scores = rng.random((shape[0], cfg["n_routed_experts"]))
        return np.argsort(scores, axis=1)[:, : shape[1]].astype(np.int64)
    if parts[-1] == "bias":  # router correction: moves the choice, not the weight
        return rng.normal(0.0, 0.25, shape)
    if leaf.startswith("hc_"):
        what = leaf.rsplit("_", 1)[1]
        if what == "fn":
            return rng.standard_normal(shape) / np.sqrt(shape[1])
        if what == "scale":
            return rng.uniform(0.4, 0.9, shape)
        base = rng.normal(0.0, 1.2, shape)
        if shape[0] > hc:  # pre, post and the mixing matrix: keep the streams apart
            base[2 * hc :] += 2.0 * np.eye(hc).ravel()
        return base
    w = rough_matrix(rng, shape, GAIN[leaf] / np.sqrt(shape[1]))
    if leaf == "weights_proj":
        w += 2.0 * common_direction(cfg, seed) / shape[1]
    if name.endswith("indexer.wq_b.weight"):
        w *= np.tile(hot_channels(cfg, seed, name), cfg["index_n_heads"])[:, None]
    return w


def hot_channels(cfg, seed, name):
    """A few strong channels in the indexer's queries and keys.  Scores then spread widely compared with the
    FP4 noise (decisive selection), and the Hadamard rotation before FP4 has something to do."""
    n = cfg["index_head_dim"]
    gain = np.full(n, 0.3)
    gain[
        rng_for(seed, "hot channels " + name.split(".indexer.")[0]).choice(
            n, n // 10, replace=False
        )
    ] = 3.0
    return gain


def common_direction(cfg, seed):
    """A direction shared by all embeddings.  The indexer's head weights lean on it and so are mostly
    positive; otherwise scores of exactly 0 (all ReLUs shut) would tie at the selection boundary."""
    return 0.8 * rng_for(seed, "common direction").standard_normal(cfg["hidden_size"])


def logical_shape(dtype, shape):
    return (shape[0], shape[1] * 2) if dtype == "I8" else shape


def stored_tensors(cfg, seed, shard):
    """[(name, dtype, raw array)] of one shard; a scale directly follows its weight."""
    out, pending = [], None
    for name, dtype, shape in shard:
        if dtype == "F8_E8M0":
            assert pending.shape == shape, (name, pending.shape, shape)
            out.append((name, dtype, pending))
            pending = None
            continue
        v = values(cfg, seed, name, dtype, logical_shape(dtype, shape))
        if dtype == "F8_E4M3":
            raw, pending = fmt.quantise_fp8(v)
        elif dtype == "I8":
            raw, pending = fmt.quantise_fp4(v)
            raw = raw.view(np.int8)
        elif dtype == "BF16":
            raw = fmt.to_bf16(v)
        else:
            raw = v.astype(fmt.NP[dtype])
        assert raw.shape == tuple(shape), (name, raw.shape, shape)
        out.append((name, dtype, raw))
    return out


def inference_config(cfg):
    """The companion inference/config.json, in the official run-time key names."""
    rope, r = cfg["rope_scaling"], {}
    for ours, theirs in (
        ("vocab_size", "vocab_size"),
        ("dim", "hidden_size"),
        ("moe_inter_dim", "moe_intermediate_size"),
        ("n_layers", "num_hidden_layers"),
        ("n_hash_layers", "num_hash_layers"),
        ("n_heads", "num_attention_heads"),
        ("n_routed_experts", "n_routed_experts"),
        ("n_shared_experts", "n_shared_experts"),
        ("n_activated_experts", "num_experts_per_tok"),
        ("score_func", "scoring_func"),
        ("route_scale", "routed_scaling_factor"),
        ("swiglu_limit", "swiglu_limit"),
        ("q_lora_rank", "q_lora_rank"),
        ("head_dim", "head_dim"),
        ("rope_head_dim", "qk_rope_head_dim"),
        ("norm_eps", "rms_norm_eps"),
        ("o_groups", "o_groups"),
        ("o_lora_rank", "o_lora_rank"),
        ("window_size", "sliding_window"),
    ):
        r[ours] = cfg[theirs]
    r.update(
        original_seq_len=rope["original_max_position_embeddings"],
        rope_theta=cfg["rope_theta"],
        rope_factor=rope["factor"],
        beta_fast=rope["beta_fast"],
        beta_slow=rope["beta_slow"],
    )
    for key in (
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "hc_mult",
        "hc_sinkhorn_iters",
        "hc_eps",
    ):
        r[key] = cfg[key]
    r.update(
        dtype="fp8",
        scale_fmt="ue8m0",
        expert_dtype="fp4",
        compress_rope_theta=cfg["compress_rope_theta"],
        compress_ratios=cfg["compress_ratios"],
    )
    return r


def write_tokenizer(out, vocab_size):
    """Byte-level BPE: ids 0-2 are special, 3-258 are the bytes, the rest are letter pairs."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        return
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    vocab = {t: i for i, t in enumerate(special)}
    for b in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[b] = len(vocab)
    merges = []
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    for x in letters:
        for y in letters:
            if len(vocab) < vocab_size:
                vocab[x + y] = len(vocab)
                merges.append((x, y))
    assert len(vocab) == vocab_size, "vocab_size must lie in 259..935"
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tok.save(os.path.join(out, "tokenizer.json"))
    with open(os.path.join(out, "tokenizer_config.json"), "w") as f:
        json.dump(
            {
                "add_bos_token": False,
                "add_eos_token": False,
                "bos_token": special[0],
                "eos_token": special[1],
                "pad_token": special[2],
                "model_max_length": 1048576,
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
            f,
            indent=2,
            ensure_ascii=False,
        )


def check(cfg):
    nope = cfg["head_dim"] - cfg["qk_rope_head_dim"]
    assert nope > 0 and nope % 64 == 0, "the KV quantiser works on groups of 64 non-rotary channels"
    assert cfg["index_head_dim"] & (cfg["index_head_dim"] - 1) == 0, (
        "the Hadamard rotation needs a power of two"
    )
    assert cfg["index_head_dim"] >= cfg["qk_rope_head_dim"]
    assert cfg["num_attention_heads"] % cfg["o_groups"] == 0
    assert len(cfg["compress_ratios"]) == cfg["num_hidden_layers"] + cfg["num_nextn_predict_layers"]
    for n in (
        cfg["hidden_size"],
        cfg["q_lora_rank"],
        cfg["moe_intermediate_size"],
        cfg["head_dim"],
        cfg["o_groups"] * cfg["o_lora_rank"],
        cfg["num_attention_heads"] * cfg["head_dim"] // cfg["o_groups"],
        cfg["index_n_heads"] * cfg["index_head_dim"],
    ):
        assert n % 128 == 0, "FP8 matrices are stored in 128 x 128 tiles"


def make(out, seed, preset, overrides=None):
    cfg = json.loads(json.dumps({**FLASH, **PRESETS[preset], **(overrides or {})}))
    check(cfg)
    os.makedirs(os.path.join(out, "inference"), exist_ok=True)
    for old in os.listdir(out):  # no stale shards of an earlier run
        if old.startswith("model-") and old.endswith(".safetensors"):
            os.remove(os.path.join(out, old))
    shards = fmt.inventory(cfg)
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, 1):
        fname = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        rows = stored_tensors(cfg, seed, shard)
        total += fmt.write_safetensors(os.path.join(out, fname), rows, {"format": "pt"})
        weight_map.update({name: fname for name, _, _ in rows})

    def dump(name, obj):
        with open(os.path.join(out, name), "w") as f:
            json.dump(obj, f, indent=2)
            f.write("\n")

    dump("config.json", cfg)
    dump("inference/config.json", inference_config(cfg))
    dump(
        "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "transformers_version": "4.46.3",
        },
    )
    dump(
        "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    write_tokenizer(out, cfg["vocab_size"]) if cfg["vocab_size"] < 936 else None
    return cfg, len(weight_map), total


if __name__ == "__main__":
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--out", required=True)
    ap.add_argument("--seed", type=int, required=True)
    ap.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    ap.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON", help="override a config key"
    )
    args = ap.parse_args()
    extra = {k: json.loads(v) for k, v in (s.split("=", 1) for s in args.set)}
    _, count, size = make(args.out, args.seed, args.preset, extra)
    print(f"{args.out}: preset {args.preset}, seed {args.seed}, {count} tensors, {size} bytes")
