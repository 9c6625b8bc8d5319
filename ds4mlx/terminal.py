"""What a person sees of a generation: streamed text, dimmed reasoning, a timing line."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import mlx.core as mx

from ds4mlx.generation import Response
from ds4mlx.tokenizer import Tokenizer

THINK_END = "</think>"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
TOP = 20


class Printer:
    """Writes streamed text; on a terminal the reasoning is dim and its end mark a blank line.

    Anywhere else the text is written as it is, so the reasoning ends with `</think>`.
    """

    def __init__(self, out: TextIO, reasoning: bool):
        self.out, self.styled = out, out.isatty()
        self.reasoning = reasoning
        if reasoning and self.styled:
            out.write(DIM)

    def write(self, text: str) -> None:
        """Show more text at once."""
        if self.reasoning and THINK_END in text:
            before, _, text = text.partition(THINK_END)
            mark = f"{PLAIN}\n\n" if self.styled else THINK_END
            self.out.write(before + mark)
            self.reasoning = False
        self.out.write(text)
        self.out.flush()

    def close(self) -> None:
        """End the line, and the dimming if the reasoning was cut short."""
        self.out.write((PLAIN if self.reasoning and self.styled else "") + "\n")
        self.out.flush()


def show(responses: Iterable[Response], printer: Printer) -> tuple[list[Response], bool]:
    """Print responses as they come; returns them and whether Ctrl-C ended them."""
    seen: list[Response] = []
    interrupted = False
    try:
        for response in responses:
            seen.append(response)
            printer.write(response.text)
    except KeyboardInterrupt:
        interrupted = True
    printer.close()
    return seen, interrupted


def timing(last: Response) -> str:
    """One line of token counts, speeds and memory."""
    return (
        f"[prompt {last.prompt_tokens} tokens, {last.prompt_tps:.1f} t/s | "
        f"generated {last.generation_tokens} tokens, {last.generation_tps:.1f} t/s | "
        f"peak memory {last.peak_memory:.2f} GB]"
    )


def write_logprobs(responses: Iterable[Response], tokenizer: Tokenizer, path: Path) -> None:
    """One JSON object a token: id, text, bytes, log-probability, and the 20 likeliest tokens."""
    with path.open("w", encoding="utf-8") as file:
        for response in responses:
            line = {
                **_token(response.token, response.logprobs, tokenizer),
                "top": [_token(t, response.logprobs, tokenizer) for t in _likeliest(response)],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _likeliest(response: Response) -> list[int]:
    return mx.argsort(-response.logprobs)[:TOP].tolist()  # type: ignore[return-value]


def _token(token: int, logprobs: mx.array, tokenizer: Tokenizer) -> dict[str, object]:
    raw = tokenizer.token_bytes(token)
    return {
        "token": token,
        "text": raw.decode("utf-8", errors="replace"),
        "bytes": list(raw),
        "logprob": logprobs[token].item(),
    }


def prefill_note(done: int, total: int) -> None:
    """Progress of a long prompt on a terminal's stderr."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        sys.stderr.write(f"\rprompt: {done:,} of {total:,} tokens{end}")
        sys.stderr.flush()
