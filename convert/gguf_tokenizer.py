"""`tokenizer.json` from the tokenizer in a GGUF file's metadata; it encodes identically."""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ds4mlx.config import ModelConfig
from ds4mlx.convert.gguf_files import GGUFFiles
from ds4mlx.convert.special_tokens import check_special_tokens
from ds4mlx.errors import DataError
from ds4mlx.text.tokenizer import Tokenizer as OurTokenizer

# Names under which llama.cpp has the pre-tokenizer of DeepSeek-V3 and -V4.
PRE_TOKENIZERS = ("joyai-llm", "deepseek-v3")
CONTROL, USER_DEFINED = 3, 4
DIGITS = r"\p{N}{1,3}"
HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
WORDS = "|".join(
    [
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        "[^\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+" + "[\r\n]*",
        r"\s*" + "[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def tokenizer_files(file: GGUFFiles, model: ModelConfig) -> dict[str, bytes]:
    """{name: bytes} of tokenizer.json and tokenizer_config.json; none if the file has no tokenizer.

    Raises DataError if the tokenizer lacks a special token that chat writes.
    """
    if file.value("tokenizer.ggml.tokens") is None:
        return {}
    tokenizer = build_tokenizer(file)
    ours = OurTokenizer(tokenizer, model.bos_token_id, model.eos_token_id)
    check_special_tokens(ours, file.path, model)
    config: dict[str, Any] = {"add_bos_token": False, "add_eos_token": False}
    for name in ("bos", "eos"):
        number = file.value(f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            config[f"{name}_token"] = tokenizer.id_to_token(int(number))
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, ensure_ascii=False) + "\n").encode(),
    }


def build_tokenizer(file: GGUFFiles) -> Tokenizer:
    """Byte-level BPE with DeepSeek's pre-tokenizer. Raises DataError for any other kind."""
    kind, pre = file.text("tokenizer.ggml.model"), file.text("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise DataError(
            f"{file.path}: tokenizer {kind}/{pre} is not supported, only gpt2/joyai-llm"
        )
    tokens = _texts(file, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _texts(file, "tokenizer.ggml.merges")]
    odd = next((merge for merge in merges if len(merge) != 2), None)
    if odd is not None:
        raise DataError(f"{file.path}: tokenizer.ggml.merges: {' '.join(odd)!r} is no pair")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        cause = str(error).splitlines()[0]
        raise DataError(f"{file.path}: tokenizer.ggml.merges: {cause}") from None
    steps = [pre_tokenizers.Split(Regex(x), "isolated") for x in (DIGITS, HAN_AND_KANA, WORDS)]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    types = _types(file, len(tokens))
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    own = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in own])
    return tokenizer


def _types(file: GGUFFiles, count: int) -> list[int]:
    """The type of every token: without it no token would be read as a special one."""
    key = "tokenizer.ggml.token_type"
    types = file.value(key)
    if not isinstance(types, list) or len(types) != count or any(type(t) is not int for t in types):
        raise DataError(f"{file.path}: {key} is missing or has not one number a token")
    return types


def _texts(file: GGUFFiles, key: str) -> list[str]:
    found = file.value(key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise DataError(f"{file.path}: {key} is missing or not a list of texts")
    return found
