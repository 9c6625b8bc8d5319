"""Checks that a tokenizer has the special tokens that chat writes, each as one id."""

from pathlib import Path

from ds4mlx.chat.tokens import ASSISTANT, BOS, CONTROL, DSML, EOS, THINK, THINK_END, USER
from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.text.tokenizer import Tokenizer

CORE = (BOS, EOS, USER, ASSISTANT, THINK, THINK_END, DSML)
# The tokens of quick tasks and reminders: an older tokenizer lacks all of them, none lacks a few.
TASKS = tuple(token for token in CONTROL if token not in CORE)
# A vocabulary of bytes and a few pairs belongs to a test model that only ever sees raw text.
RAW_TEXT = 1024


def check_special_tokens(tokenizer: Tokenizer, file: Path, config: ModelConfig) -> None:
    """Raises DataError naming the file and the first token that is missing or not one id."""
    encoder = tokenizer.encoder
    there = {token: encoder.token_to_id(token) is not None for token in (*CORE, *TASKS)}
    chats = encoder.get_vocab_size() >= RAW_TEXT or any(there[token] for token in CORE[2:])
    needed = CORE if chats else CORE[:2]
    if any(there[token] for token in TASKS):
        needed += TASKS
    for token in needed:
        if not there[token]:
            raise DataError(f"{file}: the special token {token} is missing, and chat needs it")
    for token in filter(there.__getitem__, there):
        _check_one_id(tokenizer, file, token)
    for token, id, key in ((BOS, config.bos_token_id, "bos"), (EOS, config.eos_token_id, "eos")):
        if encoder.token_to_id(token) != id:
            raise DataError(
                f"{file}: the special token {token} has id {encoder.token_to_id(token)}, and "
                f"{key}_token_id is {id}"
            )


def _check_one_id(tokenizer: Tokenizer, file: Path, token: str) -> None:
    """The token must be one id, alone and between words, and that id must spell it."""
    id = tokenizer.encoder.token_to_id(token)
    inside = tokenizer.encode(f"a {token} b")
    around = tokenizer.encode("a "), tokenizer.encode(" b")
    alone = inside == [*around[0], id, *around[1]]
    if id is None or not alone or tokenizer.decode([id]) != token:
        raise DataError(
            f"{file}: the special token {token} is read as ordinary text or swallows its "
            "neighbours: it is not marked as a special token, or wrongly"
        )
