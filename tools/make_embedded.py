#!/usr/bin/env python3
"""Make the embedded checkpoint: the official format, random weights, a small trained tokenizer.

    python tools/make_embedded.py ds4mlx/embedded

Run from the root of a checkout with the `test` extra installed. The tokenizer is trained on the
running Python's standard library, so another Python version gives another one.
"""

import json
import sys
import sysconfig
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "oracle"))
import make_checkpoint

VOCABULARY = 768
SPECIAL = [
    *(
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
    ),
    *("<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>"),
    *("<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜extracted_url｜>", "<｜read_url｜>"),
]
SIZES = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_attention_heads": 2,
    "o_groups": 1,
    "n_routed_experts": 4,
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_topk": 32,
    "sliding_window": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 65536,
}
# The official pre-tokenisation: digit runs by threes, CJK runs, then words, punctuation and spaces.
SPLITS = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE with the official special tokens, which come first."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer.train([str(p) for p in sorted(library.glob("*.py"))], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def main(out: Path) -> None:
    """Write the checkpoint and its tokenizer into `out`."""
    make_checkpoint.make(str(out), 1, "tiny", SIZES)
    train_tokenizer().save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False) + "\n")
    (out / "inference" / "config.json").unlink()
    (out / "inference").rmdir()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
