#!/usr/bin/env python3
"""Write a small random DeepSeek-V4 checkpoint in the official Hugging Face format.

    python make_checkpoint.py --out DIR --seed S [--preset tiny] [--set key=value ...]

Needs NumPy only (and `tokenizers` for the optional tokenizer.json).  Same
config keys, tensor names, dtypes, scale layout and shard layout as
DeepSeek-V4-Flash; only the dimensions are small (`presets`) and the values random
(`random_values`).
"""

import argparse
import json
import os

import numpy as np

import v4format as fmt
from presets import FLASH, PRESETS
from random_values import logical_shape, values


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
