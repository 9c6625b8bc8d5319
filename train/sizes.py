"""The shape of ds4-tiny: Flash's first five layers' schedule, everything else small.

Weight rows are multiples of 256 wide where 2- and 4-bit blocks need it.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))

SIZES = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_hash_layers": 1,
    "compress_ratios": [0, 0, 4, 128, 4, 0],
    "num_attention_heads": 4,
    "head_dim": 256,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "index_n_heads": 8,
    "index_head_dim": 128,
    "index_topk": 128,
    "sliding_window": 128,
    "vocab_size": 3072,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 8192,
        "type": "yarn",
    },
}
TRAINED_LENGTH = 8192


def full_config() -> dict[str, Any]:
    """The official config.json of ds4-tiny."""
    from presets import FLASH

    return {**FLASH, **SIZES, "torch_dtype": "bfloat16"}
