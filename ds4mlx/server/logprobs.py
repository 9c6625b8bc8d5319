"""Log-probabilities in OpenAI's two shapes."""

import codecs
from collections.abc import Iterator
from typing import Any

from ds4mlx.engine.request import TokenProbs


def chat_logprobs(tokens: list[TokenProbs]) -> dict[str, Any] | None:
    """Those of chat.completions; `bytes` are exact where a token is a part of a character."""
    if not tokens:
        return None
    content = [
        _entry(token.text_bytes, token.logprob)
        | {"top_logprobs": [_entry(text, logprob) for text, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: list[TokenProbs], offset: int) -> dict[str, Any] | None:
    """Those of completions; offset: characters before the first token."""
    if not tokens:
        return None
    return {
        "tokens": [_text(token.text_bytes) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{_text(text): logprob for text, logprob in token.top} for token in tokens],
        "text_offset": list(_offsets(tokens, offset)),
    }


def _offsets(tokens: list[TokenProbs], offset: int) -> Iterator[int]:
    """Characters before each token; those that it is a part of come with their last token."""
    read = codecs.getincrementaldecoder("utf-8")("replace").decode
    for token in tokens:
        yield offset
        offset += len(read(token.text_bytes))


def _entry(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(text), "bytes": list(text), "logprob": logprob}


def _text(text: bytes) -> str:
    return text.decode(errors="replace")
