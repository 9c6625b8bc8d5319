"""Options that several commands share, and what they are turned into.

Whatever is wrong with an option is wrong usage, so it is found before a model is loaded.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import mlx.core as mx
import typer

from ds4mlx.cli.terminal import progress
from ds4mlx.engine.default_model import default_model
from ds4mlx.engine.load import load
from ds4mlx.errors import DataError
from ds4mlx.model import model as network
from ds4mlx.store import KVStore
from ds4mlx.text.tokenizer import Tokenizer

SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

Model = Annotated[
    str | None,
    typer.Option("-m", "--model", help="Model directory; default $DS4MLX_MODEL, else a small one."),
]
System = Annotated[str | None, typer.Option("--system", help="System text.")]
Think = Annotated[
    Literal["none", "low", "high", "max"],
    typer.Option("--think", help="Reasoning before the answer."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=0, help="Longest answer, in tokens.")]
Temp = Annotated[float, typer.Option("--temp", help="Temperature; 0 is greedy and repeatable.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest share of tokens.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0: all.")]
MinP = Annotated[float, typer.Option("--min-p", help="Least share of the likeliest token.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
KvDir = Annotated[
    Path | None, typer.Option("--kv-dir", help="Keep prompts here, so that each is read in once.")
]
KvBudget = Annotated[str, typer.Option("--kv-budget", help="Most bytes in --kv-dir.")]
KvText = Annotated[
    bool, typer.Option("--kv-text/--no-kv-text", help="Keep readable text in --kv-dir too.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """What is wrong with the value of an option, a DataError, is wrong usage here."""
    try:
        yield
    except DataError as error:
        raise typer.BadParameter(str(error)) from None


def prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from exactly one of the two options, byte for byte."""
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give exactly one of -p and --prompt-file")
    if "-" in (prompt, prompt_file):
        name, raw = "stdin", sys.stdin.buffer.read()
    elif prompt_file is None:
        return prompt or ""
    else:
        name, raw = prompt_file, Path(prompt_file).read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def size(text: str) -> int:
    """Bytes of a size such as 512M or 1.5G."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    found = int(float(match[1]) * SIZE_UNITS[match[2].upper()]) if match else 0
    if found < 1:
        raise typer.BadParameter(f"{text!r} is not a size such as 512M or 8G")
    return found


@contextlib.contextmanager
def open_store(
    directory: Path | None,
    budget: str,
    keep_text: bool,
    loaded: tuple[network.Model, Tokenizer],
    label: str | None,
) -> Iterator[KVStore | None]:
    """The KV store of a command, if it was asked for one; what is being saved ends first."""
    if directory is None:
        yield None
        return
    model, tokenizer = loaded
    name = Path(label or os.environ.get("DS4MLX_MODEL", "embedded")).name
    with KVStore(
        directory, size(budget), model, tokenizer=tokenizer, keep_text=keep_text, label=name
    ) as store:
        yield store


def open_model(path: str | None) -> tuple[network.Model, Tokenizer]:
    """Load a model for the command line: bfloat16, or float32 where MLX has only the CPU."""
    on_cpu = mx.default_device() == mx.cpu  # where bfloat16 is slower and less exact
    dtype = mx.float32 if on_cpu else mx.bfloat16
    return load(path or default_model(), dtype, on_file=partial(progress, "loading", "files"))
