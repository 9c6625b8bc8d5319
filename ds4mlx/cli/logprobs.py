"""The file of `generate --logprobs`: one JSON object a token."""

import json
from typing import TextIO

import mlx.core as mx

from ds4mlx.engine.generation import Response
from ds4mlx.text.tokenizer import Tokenizer

TOP = 20


class LogProbs:
    """Writes one JSON object a token: id, text, bytes, log-probability, the 20 likeliest tokens."""

    def __init__(self, file: TextIO, tokenizer: Tokenizer):
        self.file, self.tokenizer = file, tokenizer

    def add(self, response: Response) -> None:
        """Write the line of a token."""
        likeliest: list[int] = mx.argsort(-response.logprobs)[:TOP].tolist()  # type: ignore[assignment]
        tokens = [response.token, *likeliest]
        first, *top = (_token(token, response.logprobs, self.tokenizer) for token in tokens)
        self.file.write(json.dumps({**first, "top": top}, ensure_ascii=False) + "\n")


def _token(token: int, logprobs: mx.array, tokenizer: Tokenizer) -> dict[str, object]:
    raw = tokenizer.token_bytes(token)
    return {
        "token": token,
        "text": raw.decode("utf-8", errors="replace"),
        "bytes": list(raw),
        "logprob": logprobs[token].item(),
    }
