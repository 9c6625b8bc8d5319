"""The text that ds4-tiny learns from: CPython's library, and conversations made on the spot.

    python -m train.corpus OUT

writes `OUT/tokenizer.json` (trained on a sample of both kinds) and `OUT/modules.npy`, the library's
modules as token ids. Those of `ds4mlx.evaluation.held_out` are left out. Another Python version's
library gives another tokenizer and another model.
"""

import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ds4mlx.chat.tokens import BOS
from ds4mlx.evaluation.held_out import MODULES, filler_of
from ds4mlx.evaluation.recall import document
from train.dialogues import chat, tool_call
from train.sizes import SIZES

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
# The official pre-tokenisation: digit runs by threes, CJK runs, then words, punctuation and spaces.
SPLITS = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
LEFT_OUT = {"site-packages", "encodings", "__pycache__"}
FOREIGN_SHARE = 0.01  # of a module's characters at most
MODULE_SAMPLE, DIALOGUES = 400, 6000


def modules() -> list[str]:
    """The sources of the running Python's library, held-out modules and data-like ones left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not LEFT_OUT & set(f.parts)]
    return [text for file in files if (text := _source(file))]


def _source(file: Path) -> str | None:
    name = file.stem.removeprefix("test_")
    if name in MODULES or file.stat().st_size > 1_000_000:
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    foreign = len(text) - len(text.encode("ascii", "ignore"))
    return text if text.strip() and foreign <= FOREIGN_SHARE * len(text) else None


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with the official special tokens, which come first."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    assert tokenizer.get_vocab_size() == SIZES["vocab_size"]
    return tokenizer


def _sample(texts: list[str]) -> Iterator[str]:
    """A share of the library, and conversations with the words of every task."""
    rng = random.Random(0)
    yield from rng.sample(texts, MODULE_SAMPLE)
    nothing = filler_of(("\n",), 0)
    for _ in range(DIALOGUES):
        yield chat(rng)
        yield tool_call(rng)[-600:]  # the declared tools' fixed text need not fill the vocabulary
        yield document(rng, 8, 4, nothing).text


def main(out: Path) -> None:
    """Write the tokenizer and the encoded library."""
    out.mkdir(parents=True, exist_ok=True)
    texts = modules()
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    ids = [
        t.ids for t in tokenizer.encode_batch([BOS + t for t in texts], add_special_tokens=False)
    ]
    np.save(out / "modules.npy", np.concatenate(ids).astype(np.uint16))
    print(f"{len(texts)} files, {sum(map(len, texts)):,} characters, {sum(map(len, ids)):,} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
