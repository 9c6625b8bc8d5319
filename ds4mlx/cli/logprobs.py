"""The file of `generate --logprobs`: one JSON object a token."""

import json
from pathlib import Path
from typing import Self

import mlx.core as mx

from ds4mlx.engine.generation import Response
from ds4mlx.text.tokenizer import Tokenizer

TOP = 20


class LogProbs:
    """Writes one JSON object a token: id, text, bytes, log-probability, the 20 likeliest tokens.

    Without a path it writes nothing.
    """

    def __init__(self, path: Path | None):
        self.file = None if path is None else path.open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, tokenizer: Tokenizer, response: Response) -> None:
        """Write the line of a token."""
        if self.file is None:
            return
        likeliest: list[int] = mx.argsort(-response.logprobs)[:TOP].tolist()  # type: ignore[assignment]
        tokens = [response.token, *likeliest]
        first, *top = (_token(token, response.logprobs, tokenizer) for token in tokens)
        self.file.write(json.dumps({**first, "top": top}, ensure_ascii=False) + "\n")


def _token(token: int, logprobs: mx.array, tokenizer: Tokenizer) -> dict[str, object]:
    raw = tokenizer.token_bytes(token)
    return {
        "token": token,
        "text": raw.decode("utf-8", errors="replace"),
        "bytes": list(raw),
        "logprob": logprobs[token].item(),
    }
