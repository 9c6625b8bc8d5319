"""Log-probabilities in OpenAI's two shapes."""

import codecs
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


class TextLogprobs:
    """Those of completions, given in pieces.

    Tokens are counted and not what was told, which may lack their end: a stop text may begin there.
    """

    def __init__(self):
        self._offset = 0  # characters before the next token
        self._read = codecs.getincrementaldecoder("utf-8")("replace").decode

    def of(self, tokens: list[TokenProbs]) -> dict[str, Any] | None:
        """Those of the next tokens; None for none."""
        if not tokens:
            return None
        return {
            "tokens": [_text(token.text_bytes) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {_text(text): logprob for text, logprob in token.top} for token in tokens
            ],
            "text_offset": [self._passed(token) for token in tokens],
        }

    def _passed(self, token: TokenProbs) -> int:
        """Characters before a token; those that it is a part of come with their last token."""
        before = self._offset
        self._offset += len(self._read(token.text_bytes))
        return before


def _entry(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(text), "bytes": list(text), "logprob": logprob}


def _text(text: bytes) -> str:
    return text.decode(errors="replace")
