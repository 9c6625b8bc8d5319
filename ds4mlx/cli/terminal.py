"""What a person sees of a generation: streamed text, dimmed reasoning, progress, a timing line."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Self, TextIO

import mlx.core as mx

from ds4mlx.engine.generation import Response
from ds4mlx.text.tokenizer import Tokenizer

THINK_END = "</think>"
DIM, PLAIN, ERASE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
TOP = 20


class Printer:
    """Writes streamed text; on a terminal the reasoning is dim and its end mark a blank line.

    Anywhere else the text is written as it is, so the reasoning ends with `</think>`. $NO_COLOR
    and a dumb terminal are respected.
    """

    def __init__(self, out: TextIO, reasoning: bool):
        self.out, self.is_terminal = out, out.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.styled = self.is_terminal and not plain
        self.reasoning = reasoning
        self._last = ""  # what was written last

    def write(self, text: str) -> None:
        """Show more text at once."""
        if self.reasoning and THINK_END in text:
            before, _, text = text.partition(THINK_END)
            self._put(before)
            self._put(self._end_of_reasoning())
            self.reasoning = False
        self._put(text)
        self.out.flush()

    def close(self, interrupted: bool = False) -> None:
        """End the line, if one was begun, and the dimming if the reasoning was cut short.

        A terminal shows `^C` where an answer was interrupted, which begins a line too.
        """
        begun = self._last and not self._last.endswith("\n")
        plain = self._plain() if self._last else ""
        self.out.write(plain + ("\n" if begun or (interrupted and self.is_terminal) else ""))
        self.out.flush()

    def _put(self, text: str) -> None:
        if text:
            dim = DIM if self.styled and self.reasoning and not self._last else ""
            self._last = text  # first, as Ctrl-C may come once the text is out
            self.out.write(dim + text)

    def _end_of_reasoning(self) -> str:
        if not self.is_terminal:
            return THINK_END
        return f"{self._plain()}\n\n" if self._last else ""

    def _plain(self) -> str:
        return PLAIN if self.styled and self.reasoning else ""


def show(
    responses: Generator[Response, None, None],
    printer: Printer,
    keep: Callable[[Response], None] | None = None,
) -> tuple[Response | None, bool]:
    """Print responses as they come; returns the last one and whether Ctrl-C ended them.

    keep: also told each. They are not collected here: each holds an array as long as the
    vocabulary.
    """
    last, interrupted = None, False
    try:
        with contextlib.closing(responses):
            for last in responses:
                printer.write(last.text)
                if keep is not None:
                    keep(last)
    except KeyboardInterrupt:
        interrupted = True
        if last is None:
            erase_line()
    finally:
        printer.close(interrupted)
    return last, interrupted


def timing(last: Response) -> str:
    """One line of token counts, speeds and memory."""
    speed = f", {last.generation_tps:.1f} t/s" if last.generation_tokens > 1 else ""
    cut = " (cut: --max-tokens)" if last.finish_reason == "length" else ""
    cached = f" after {last.cached_tokens} kept" if last.cached_tokens else ""
    return (
        f"[prompt {last.prompt_tokens} tokens{cached}, {last.prompt_tps:.1f} t/s | "
        f"generated {last.generation_tokens} tokens{speed}{cut} | "
        f"peak memory {last.peak_memory:.2f} GB]"
    )


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


def progress(what: str, unit: str, done: int, total: int) -> None:
    """A line on a terminal's stderr that changes in place and vanishes when all is done."""
    erase_line()
    if done < total and _can_erase():
        sys.stderr.write(f"{what}: {done:,} of {total:,} {unit}")
        sys.stderr.flush()


def erase_line() -> None:
    """Remove what `progress` left; nothing where it writes nothing."""
    if _can_erase():
        sys.stderr.write(ERASE)
        sys.stderr.flush()


def _can_erase() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
