"""Options that several commands share, and what they are turned into.

Whatever is wrong with an option is wrong usage, so it is said before a model is loaded.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from ds4mlx.durable import check_writable, put_in_place
from ds4mlx.engine import machine
from ds4mlx.errors import DataError

if TYPE_CHECKING:
    from ds4mlx.engine.rules import Rule
    from ds4mlx.engine.sampling import Sampler

# What the sampler calls its values, where the option has another name.
SAMPLER_OPTIONS = {"temperature": "--temp", "top_p": "--top-p", "top_k": "--top-k"}
SAMPLER_OPTIONS |= {"min_p": "--min-p", "seed": "--seed"}

Dtype = Literal["float32", "bfloat16"]


def _named(model: str | None) -> str | None:
    if model is not None and not model.strip():
        raise typer.BadParameter("names no model; leave the option out to use the default")
    return model


Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        callback=_named,
        help="A model directory or the hub repository of one; by default $DS4MLX_MODEL, else the "
        "small model that comes with ds4mlx.",
    ),
]
System = Annotated[str | None, typer.Option("--system", help="The system text.")]
Think = Annotated[
    Literal["none", "low", "high", "max"],
    typer.Option("--think", help="How much the model reasons before it answers."),
]
Reasoning = Annotated[
    Literal["show", "hide"] | None,
    typer.Option(
        "--reasoning", help="Show the reasoning, or only the answer; by default on a terminal only."
    ),
]
ThinkBudget = Annotated[
    int | None,
    typer.Option("--think-budget", min=0, help="The most tokens of reasoning before the answer."),
]
JsonSchema = Annotated[
    Path | None,
    typer.Option("--json-schema", help="A file with a JSON schema, which the answer obeys."),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=0, help="The longest answer, in tokens.")
]
Temp = Annotated[float, typer.Option("--temp", help="The temperature; 0 is greedy and repeatable.")]
TopP = Annotated[
    float, typer.Option("--top-p", help="Keep the likeliest tokens up to this share together.")
]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.")]
MinP = Annotated[
    float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest one.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="A number that makes the draws repeatable.")
]
KvDir = Annotated[
    Path | None,
    typer.Option("--kv-dir", help="Keep what was read in here, so that it is read in once."),
]
KV_PLACE = "ds4mlx/kv in the user's folder of caches ($XDG_CACHE_HOME)"
Kv = Annotated[bool, typer.Option("--kv", help=f"The same in the usual place: {KV_PLACE}.")]
KvBudget = Annotated[str, typer.Option("--kv-budget", help="The most bytes to keep there.")]
KvText = Annotated[
    bool, typer.Option("--kv-text/--no-kv-text", help="Keep the readable text there too.")
]
Draft = Annotated[
    int,
    typer.Option(
        "--draft",
        min=0,
        max=3,
        help="Have the model's draft block propose up to N tokens a step, while that is faster here.",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", help="A directory with an adapter (LoRA) to use with the model."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """What is wrong with the value of an option, a DataError, is wrong usage here."""
    try:
        yield
    except DataError as error:
        raise typer.BadParameter(str(error)) from None


def sampler(temp: float, top_p: float, top_k: int, min_p: float, seed: int | None) -> Sampler:
    """How tokens are drawn; wrong usage, by the option's name, for values out of range."""
    from ds4mlx.engine.sampling import Sampler

    try:
        return Sampler(temp, top_p, top_k, min_p, seed)
    except DataError as error:
        name, _, rest = str(error).partition(" ")
        raise typer.BadParameter(rest, param_hint=SAMPLER_OPTIONS[name]) from None


def stop_strings(stop: list[str] | None) -> None:
    """Wrong usage for an empty stop string."""
    if stop and not all(stop):
        raise typer.BadParameter("an empty text ends nothing", param_hint="--stop")


def rule(json_schema: Path | None) -> Rule | None:
    """What the answer must be, by a file with a JSON schema. Raises DataError and OSError, naming the file."""
    if json_schema is None:
        return None
    from ds4mlx.engine import schemas

    try:
        schema = json.loads(json_schema.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{json_schema}: not a JSON schema: {error}") from None
    return schemas.json_schema(schema, f"{json_schema}, a JSON schema,")


def shown(reasoning: Literal["show", "hide"] | None) -> bool | None:
    """Whether reasoning is shown; None where the output decides."""
    return None if reasoning is None else reasoning == "show"


def prompt_text(text: str | None, prompt: str | None, prompt_file: str | None, raw: bool) -> str:
    """The prompt from exactly one source: an argument, -p, --prompt-file, or standard input.

    What is read is taken byte for byte if `raw`, else without the line end that closes it.
    """
    given = [each for each in (text, prompt, prompt_file) if each is not None]
    if len(given) > 1:
        raise typer.BadParameter("give the prompt once: as TEXT, with -p or with --prompt-file")
    if not given:
        read = _piped()
    elif given == ["-"]:
        read = sys.stdin.buffer.read()
    elif prompt_file is not None:
        read = Path(prompt_file).read_bytes()
    else:
        return given[0]
    name = prompt_file if prompt_file not in (None, "-") else "stdin"
    try:
        whole = read.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    return whole if raw else re.sub(r"\r?\n\Z", "", whole)


def _piped() -> bytes:
    """Standard input, where something is sent there; else the prompt is missing."""
    read = b""
    if not sys.stdin.isatty():
        with contextlib.suppress(OSError):
            read = sys.stdin.buffer.read()
    if not read:
        raise typer.BadParameter(
            "there is no prompt: give it as TEXT, with -p, with --prompt-file or on standard input"
        )
    return read


def size(text: str) -> int:
    """Bytes of a size such as 512M or 1.5G."""
    with checked():
        return machine.size(text)


@contextlib.contextmanager
def output(path: Path | None) -> Iterator[TextIO | None]:
    """A text file to write, if there is to be one; it is put in place when the block has ended well."""
    if path is None:
        yield None
        return
    with put_in_place(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        yield file


def check_output(path: Path | None) -> None:
    """Raises OSError if a file that a command is to write cannot be written."""
    if path is not None:
        check_writable(path)


def spare(output: Path | None, *read: str | Path | None) -> None:
    """Wrong usage if a file that a command is to write is one that it reads, and would be lost."""
    if output is not None and output.is_file():
        for path in map(Path, filter(None, read)):
            if path.exists() and path.samefile(output):
                raise typer.BadParameter(f"{output} is read, and would be replaced")
