#!/usr/bin/env python3
"""Write an official-format checkpoint as GGUF, in mainline llama.cpp's dialect or like ds4's files.

    python make_gguf.py SRC OUT.gguf [--dialect mainline|ds4] [--split N] [--mtp]

The containers are written by gguf-py, which also rounds to Q8_0 and MXFP4 (experts in both dialects: it
has no quantiser for fewer bits). `Written.values` are the values that are in the file, by official name.
"""

import argparse
import json
import re
from pathlib import Path

import gguf
import numpy as np
import v4format as fmt
from gguf import GGMLQuantizationType as Type

# Official name in a block -> (GGUF name, its types in mainline's and in ds4's files).
BLOCK = {
    "attn.attn_sink": ("attn_sinks", "F32", "F32"),
    "attn.wq_a": ("attn_q_a", "Q8_0", "Q8_0"),
    "attn.q_norm": ("attn_q_a_norm", "F32", "F32"),
    "attn.wq_b": ("attn_q_b", "Q8_0", "Q8_0"),
    "attn.wkv": ("attn_kv", "Q8_0", "Q8_0"),
    "attn.kv_norm": ("attn_kv_a_norm", "F32", "F32"),
    "attn.wo_a": ("attn_output_a", "Q8_0", "Q8_0"),
    "attn.wo_b": ("attn_output_b", "Q8_0", "Q8_0"),
    "attn.compressor.ape": ("attn_compressor_ape", "F32", "F16"),
    "attn.compressor.wkv": ("attn_compressor_kv", "BF16", "F16"),
    "attn.compressor.wgate": ("attn_compressor_gate", "BF16", "F16"),
    "attn.compressor.norm": ("attn_compressor_norm", "F32", "F32"),
    "attn.indexer.wq_b": ("indexer.attn_q_b", "Q8_0", "F16"),
    "attn.indexer.weights_proj": ("indexer.proj", "BF16", "F16"),
    "attn.indexer.compressor.ape": ("indexer_compressor_ape", "F32", "F16"),
    "attn.indexer.compressor.wkv": ("indexer_compressor_kv", "BF16", "F16"),
    "attn.indexer.compressor.wgate": ("indexer_compressor_gate", "BF16", "F16"),
    "attn.indexer.compressor.norm": ("indexer_compressor_norm", "F32", "F32"),
    "attn_norm": ("attn_norm", "F32", "F32"),
    "ffn_norm": ("ffn_norm", "F32", "F32"),
    "ffn.gate": ("ffn_gate_inp", "BF16", "F16"),
    "ffn.gate.bias": ("exp_probs_b.bias", "F32", "F32"),
    "ffn.gate.tid2eid": ("ffn_gate_tid2eid", "I32", "I32"),
    "ffn.experts.w1": ("ffn_gate_exps", "MXFP4", "MXFP4"),
    "ffn.experts.w2": ("ffn_down_exps", "MXFP4", "MXFP4"),
    "ffn.experts.w3": ("ffn_up_exps", "MXFP4", "MXFP4"),
    "ffn.shared_experts.w1": ("ffn_gate_shexp", "Q8_0", "Q8_0"),
    "ffn.shared_experts.w2": ("ffn_down_shexp", "Q8_0", "Q8_0"),
    "ffn.shared_experts.w3": ("ffn_up_shexp", "Q8_0", "Q8_0"),
    "hc_attn_fn": ("hc_attn_fn", "F32", "F16"),
    "hc_attn_base": ("hc_attn_base", "F32", "F32"),
    "hc_attn_scale": ("hc_attn_scale", "F32", "F32"),
    "hc_ffn_fn": ("hc_ffn_fn", "F32", "F16"),
    "hc_ffn_base": ("hc_ffn_base", "F32", "F32"),
    "hc_ffn_scale": ("hc_ffn_scale", "F32", "F32"),
}
TOP = {
    "embed": ("token_embd", "BF16", "F16"),
    "norm": ("output_norm", "F32", "F32"),
    "head": ("output", "BF16", "Q8_0"),
    "hc_head_fn": ("output_hc_fn", "F32", "F16"),
    "hc_head_base": ("output_hc_base", "F32", "F32"),
    "hc_head_scale": ("output_hc_scale", "F32", "F32"),
}
MTP = {
    "e_proj": ("e_proj", "nextn.e_proj"),
    "h_proj": ("h_proj", "nextn.h_proj"),
    "enorm": ("enorm", "nextn.enorm"),
    "hnorm": ("hnorm", "nextn.hnorm"),
    "norm": ("norm", "nextn.shared_head_norm"),
}
DIALECTS = {"mainline": 1, "ds4": 2}
# ds4's MTP file keeps what its main file has in half precision.
MTP_TYPES = {"F16": "F32"}


class Written:
    """A GGUF in the making. `values`: what it holds, float32 or int32 by official name."""

    def __init__(self, source: Path, dialect: str = "mainline"):
        self.cfg, self.weights = fmt.load_checkpoint(str(source))
        self.tokenizer = json.loads((source / "tokenizer.json").read_text())
        self.dialect, self.values = dialect, {}

    def main(self, path: Path, split: int = 0) -> None:
        """Write the main model; `split`: tensors a file."""
        writer = gguf.GGUFWriter(path, "deepseek4", split_max_tensors=split)
        self.metadata(writer)
        for name in [*self.plain(""), *self.experts("layers.")]:
            place, kinds = self.place(name)
            self.put(writer, place, name, kinds[DIALECTS[self.dialect] - 1])
        finish(writer)

    def mtp(self, path: Path) -> None:
        """Write the MTP block as the dialect has it."""
        mainline = self.dialect == "mainline"
        writer = gguf.GGUFWriter(path, "deepseek4" if mainline else "deepseek4_mtp_support")
        for name in [*self.plain("mtp."), *self.experts("mtp.")]:
            place, kinds = self.mtp_place(name)
            kind = kinds[0] if mainline else MTP_TYPES.get(kinds[1], kinds[1])
            if not (mainline and name.endswith(("e_proj.weight", "h_proj.weight"))):
                self.put(writer, place, name, kind)
        if mainline:
            self.side_by_side(writer)
            for name in ("embed.weight", "norm.weight", "head.weight"):
                self.put(writer, self.place(name)[0], name, "F32")
        finish(writer)

    def plain(self, prefix: str) -> list[str]:
        """Official names outside the routed experts, of the main model or of the MTP block."""
        return [
            name
            for name in self.weights
            if ".experts." not in name and name.startswith("mtp.") == bool(prefix)
        ]

    def experts(self, prefix: str) -> list[str]:
        """Names of stacks, `{prefix}N.ffn.experts.wK.weight`."""
        names = (re.sub(r"experts\.\d+", "experts", n) for n in self.weights if ".experts." in n)
        return [name for name in dict.fromkeys(names) if name.startswith(prefix)]

    def place(self, name: str) -> tuple[str, tuple[str, ...]]:
        """GGUF name and types of an official name of the main model."""
        stem, found = name.removesuffix(".weight"), re.match(r"layers\.(\d+)\.", name)
        place, *kinds = BLOCK[stem[found.end() :]] if found else TOP[stem]
        suffix = "" if place.endswith(".bias") else ".weight"
        return (f"blk.{found[1]}." if found else "") + place + suffix, tuple(kinds)

    def mtp_place(self, name: str) -> tuple[str, tuple[str, ...]]:
        """GGUF name and types of an official name of the MTP block."""
        rest = name.removeprefix("mtp.0.").removesuffix(".weight")
        mainline, block = self.dialect == "mainline", f"blk.{self.cfg['num_hidden_layers']}."
        if rest.startswith("hc_head"):
            return (TOP[rest][0] if mainline else f"mtp.0.{rest}") + ".weight", TOP[rest][1:]
        if rest in MTP:
            kind = "Q8_0" if rest.endswith("proj") else "F32"
            return (block if mainline else "mtp.0.") + MTP[rest][mainline] + ".weight", (kind, kind)
        place, *kinds = BLOCK[rest]
        suffix = "" if place.endswith(".bias") else ".weight"
        return (block if mainline else "mtp.0.") + place + suffix, tuple(kinds)

    def logical(self, name: str) -> np.ndarray:
        """The values of an official name; of all experts one after another for a stack."""
        if ".ffn.experts." not in name:
            return self.weights[name]
        count = self.cfg["n_routed_experts"]
        names = [name.replace("experts.", f"experts.{e}.") for e in range(count)]
        return np.stack([self.weights[n] for n in names])

    def put(self, writer: gguf.GGUFWriter, place: str, name: str, kind: str) -> None:
        """Add a tensor; note the values that are left of it."""
        self.note(name, add(writer, place, self.logical(name), kind))

    def note(self, name: str, values: np.ndarray) -> None:
        if ".ffn.experts." not in name:
            self.values[name] = values
            return
        for e, expert in enumerate(values):
            self.values[name.replace("experts.", f"experts.{e}.")] = expert

    def side_by_side(self, writer: gguf.GGUFWriter) -> None:
        """Mainline's eh_proj."""
        pair = [self.weights[f"mtp.0.{side}_proj.weight"] for side in "eh"]
        place = f"blk.{self.cfg['num_hidden_layers']}.nextn.eh_proj.weight"
        both = add(writer, place, np.concatenate(pair, axis=1), "Q8_0")
        for side, values in zip("eh", np.split(both, 2, axis=1), strict=True):
            self.values[f"mtp.0.{side}_proj.weight"] = values

    def metadata(self, writer: gguf.GGUFWriter) -> None:
        for key, value in metadata(self.cfg, self.dialect).items():
            kind = gguf.GGUFValueType.BOOL if isinstance(value, bool) else KINDS[type(value)]
            writer.add_key_value("deepseek4." + key, value, kind)
        tokens, types = vocabulary(self.tokenizer, self.cfg["vocab_size"])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("joyai-llm")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        merges = self.tokenizer["model"]["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
        writer.add_bos_token_id(self.cfg["bos_token_id"])
        writer.add_eos_token_id(self.cfg["eos_token_id"])


KINDS = {
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
    list: gguf.GGUFValueType.ARRAY,
}


def add(writer: gguf.GGUFWriter, place: str, values: np.ndarray, kind: str) -> np.ndarray:
    """Add a tensor in a type; the values that it then stands for."""
    if kind == "I32":
        writer.add_tensor(place, values.astype(np.int32))
        return values.astype(np.int32)
    if kind in ("F32", "F16"):
        stored = values.astype(np.float32 if kind == "F32" else np.float16)
        writer.add_tensor(place, stored)
        return stored.astype(np.float32)
    raw = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), Type[kind])
    writer.add_tensor(place, raw, raw_dtype=Type[kind])
    return gguf.quants.dequantize(raw, Type[kind])


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(cfg: dict, dialect: str) -> dict:
    """The keys after `deepseek4.`, in Python types."""
    yarn, layers = cfg["rope_scaling"], cfg["num_hidden_layers"]
    keys = {
        "block_count": layers,
        "context_length": cfg["max_position_embeddings"],
        "embedding_length": cfg["hidden_size"],
        "attention.head_count": cfg["num_attention_heads"],
        "attention.head_count_kv": 1,
        "attention.key_length": cfg["head_dim"],
        "attention.value_length": cfg["head_dim"],
        "attention.layer_norm_rms_epsilon": float(cfg["rms_norm_eps"]),
        "attention.q_lora_rank": cfg["q_lora_rank"],
        "attention.output_lora_rank": cfg["o_lora_rank"],
        "attention.output_group_count": cfg["o_groups"],
        "attention.sliding_window": cfg["sliding_window"],
        "attention.compress_ratios": cfg["compress_ratios"],
        "attention.compress_rope_freq_base": float(cfg["compress_rope_theta"]),
        "attention.indexer.head_count": cfg["index_n_heads"],
        "attention.indexer.key_length": cfg["index_head_dim"],
        "attention.indexer.top_k": cfg["index_topk"],
        "rope.dimension_count": cfg["qk_rope_head_dim"],
        "rope.freq_base": float(cfg["rope_theta"]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn["factor"]),
        "rope.scaling.original_context_length": yarn["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(yarn["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(yarn["beta_slow"]),
        "expert_count": cfg["n_routed_experts"],
        "expert_used_count": cfg["num_experts_per_tok"],
        "expert_shared_count": 1,
        "expert_feed_forward_length": cfg["moe_intermediate_size"],
        "expert_gating_func": 4,
        "expert_weights_scale": float(cfg["routed_scaling_factor"]),
        "expert_weights_norm": True,
        "hash_layer_count": cfg["num_hash_layers"],
        "swiglu_clamp_exp": [float(cfg["swiglu_limit"])] * layers,
        "hyper_connection.count": cfg["hc_mult"],
        "hyper_connection.sinkhorn_iterations": cfg["hc_sinkhorn_iters"],
        "hyper_connection.epsilon": float(cfg["hc_eps"]),
    }
    if dialect == "mainline":
        keys["swiglu_clamp_shexp"] = keys["swiglu_clamp_exp"]
        keys["embedding_length_out"] = cfg["hc_mult"] * cfg["hidden_size"]
    else:
        keys |= {"vocab_size": cfg["vocab_size"], "nextn_predict_layers": 1}
    return keys


def vocabulary(tokenizer: dict, size: int) -> tuple[list[str], list[int]]:
    """All tokens by id, and their types: normal, control, user-defined or unused."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], [5] * size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, 1
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], 3 if added["special"] else 4
    return tokens, types


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dialect", choices=DIALECTS, default="mainline")
    parser.add_argument("--split", type=int, default=0, help="tensors a file")
    parser.add_argument("--mtp", action="store_true", help="the MTP block alone")
    arguments = parser.parse_args()
    written = Written(arguments.source, arguments.dialect)
    if arguments.mtp:
        written.mtp(arguments.out)
    else:
        written.main(arguments.out, arguments.split)


if __name__ == "__main__":
    main()
