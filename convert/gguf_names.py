"""The GGUF name of every entry of the inventory; both dialects use the same for the main layers."""

import re

from ds4mlx.weights.inventory import Entry

TOP = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "hc_head.fn": "output_hc_fn.weight",
    "hc_head.base": "output_hc_base.weight",
    "hc_head.scale": "output_hc_scale.weight",
}
BLOCK = {
    "hc_attn.fn": "hc_attn_fn.weight",
    "hc_attn.base": "hc_attn_base.weight",
    "hc_attn.scale": "hc_attn_scale.weight",
    "hc_ffn.fn": "hc_ffn_fn.weight",
    "hc_ffn.base": "hc_ffn_base.weight",
    "hc_ffn.scale": "hc_ffn_scale.weight",
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.experts.w1.weight": "ffn_gate_exps.weight",
    "ffn.experts.w2.weight": "ffn_down_exps.weight",
    "ffn.experts.w3.weight": "ffn_up_exps.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
}
# What only the MTP block has: in ds4's separate file, and in mainline's blocks.
DRAFT = {
    "e_proj.weight": "e_proj.weight",
    "h_proj.weight": "h_proj.weight",
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "norm.weight": "norm.weight",
    "hc_head.fn": "hc_head_fn.weight",
    "hc_head.base": "hc_head_base.weight",
    "hc_head.scale": "hc_head_scale.weight",
}
MAINLINE_DRAFT = {
    "e_proj.weight": "nextn.eh_proj.weight",
    "h_proj.weight": "nextn.eh_proj.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}


def main_name(entry: Entry) -> str:
    """GGUF name of an entry of the main model."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", entry.name)
    return f"blk.{found[1]}.{BLOCK[found[2]]}" if found else TOP[entry.name]


def draft_name(entry: Entry) -> str:
    """GGUF name of an MTP entry in ds4's separate file; ours and official names begin alike."""
    prefix, _, rest = entry.name.partition(".0.")
    return f"{prefix}.0.{(BLOCK | DRAFT)[rest]}"


def mainline_draft_name(entry: Entry, block: int) -> str:
    """GGUF name of an MTP entry in a mainline file, where the block is number `block`.

    The file's `output_hc_*` belong to the MTP block then.
    """
    rest = entry.name.partition(".0.")[2]
    if rest.startswith("hc_head."):
        return TOP[rest]
    return f"blk.{block}.{(BLOCK | MAINLINE_DRAFT)[rest]}"
