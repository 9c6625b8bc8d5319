"""The command line. Each command calls one plain function; failures are one line on stderr.

Exit codes: 0 done, 1 data, model or environment at fault, 2 wrong usage, 130 interrupted.
"""

import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from ds4mlx.errors import DataError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Thinking = Literal["none", "low", "high", "max"]
SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

ModelOption = Annotated[
    str | None,
    typer.Option("-m", "--model", help="Model directory; default $DS4MLX_MODEL, else a small one."),
]
SystemOption = Annotated[str | None, typer.Option("--system", help="System text.")]
ThinkOption = Annotated[Thinking, typer.Option("--think", help="Reasoning before the answer.")]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", min=0, help="Longest answer, in tokens.")
]
TempOption = Annotated[
    float, typer.Option("--temp", help="Temperature; 0 is greedy and repeatable.")
]
TopPOption = Annotated[float, typer.Option("--top-p", help="Keep the likeliest share of tokens.")]
TopKOption = Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0: all.")]
MinPOption = Annotated[float, typer.Option("--min-p", help="Least share of the likeliest token.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of failures.")] = False,
) -> None:
    """DeepSeek-V4-Flash on MLX: convert the official weights, then generate or chat.

    ds4mlx convert deepseek-ai/DeepSeek-V4-Flash ~/models/v4-flash
    """


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="Official directory or hub repo id.")],
    dst: Annotated[Path, typer.Argument(help="Model directory to write.")],
    recipe: Annotated[str, typer.Option(help="official, bf16 or f32.")] = "official",
    release: Annotated[
        Literal["april", "0731"] | None, typer.Option(help="Where the source does not say.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Largest chunk held in memory, such as 64M.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Convert official weights to a model directory; goes on where it was interrupted."""
    from ds4mlx.convert import convert as run

    limit = None if max_memory is None else size(max_memory)
    plan = run(
        src,
        dst,
        recipe,
        release=release,
        max_memory=limit,
        dry_run=dry_run,
        overwrite=overwrite,
    )
    if dry_run:
        print(plan)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory.")],
    against: Annotated[str | None, typer.Option(help="Source to compare every value with.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a model directory, and every value against its source."""
    from ds4mlx.convert import verify as run

    found = run(directory, against)
    if as_json:
        print(json.dumps([vars(checked) for checked in found], indent=1))
        return
    for checked in found:
        error = "" if checked.error is None else f"  relative error {checked.error:.3g}"
        print(f"ok  {checked.storage:<6} {checked.name}{error}")
    print(f"{len(found)} weights are as recorded")


@app.command()
def inspect(
    location: Annotated[str, typer.Argument(metavar="SRC_OR_DIR")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every weight.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show sizes, bytes read per token, and memory by context."""
    from ds4mlx.convert import inspect as run

    found = run(location, tensors)
    print(json.dumps(found.as_dict(), indent=1) if as_json else found)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text; - is stdin.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="File with the text; - is stdin.")] = None,
    model: ModelOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Feed the text without chat encoding.")
    ] = False,
    system: SystemOption = None,
    think: ThinkOption = "high",
    max_tokens: MaxTokensOption = 4096,
    temp: TempOption = 1.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    logprobs: Annotated[Path | None, typer.Option(help="Write JSON lines, one a token.")] = None,
) -> None:
    """Answer one prompt; text goes to stdout, a timing line to stderr."""
    text = prompt_text(prompt, prompt_file)

    from ds4mlx.chat import encode_messages
    from ds4mlx.generation import stream_generate
    from ds4mlx.sampling import Sampler
    from ds4mlx.terminal import Printer, prefill_note, show, timing, write_logprobs

    sampler = Sampler(temp, top_p, top_k, min_p, seed)
    loaded, tokenizer = open_model(model)
    if not raw:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        text = encode_messages(messages, thinking=think, release=loaded.args.release)
    responses = stream_generate(
        loaded,
        tokenizer,
        text,
        max_tokens,
        sampler=sampler,
        stop=stop or (),
        on_prefill=prefill_note,
    )
    printer = Printer(sys.stdout, reasoning=not raw and think != "none")
    seen, interrupted = show(responses, printer)
    if logprobs is not None:
        write_logprobs(seen, tokenizer, logprobs)
    if seen:
        print(timing(seen[-1]), file=sys.stderr)
    if interrupted:
        raise typer.Exit(130)


@app.command()
def chat(
    model: ModelOption = None,
    system: SystemOption = None,
    think: ThinkOption = "high",
    max_tokens: MaxTokensOption = 4096,
    temp: TempOption = 1.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = None,
) -> None:
    """Talk with the model; Ctrl-C ends an answer, Ctrl-D the chat."""
    from ds4mlx.conversation import Conversation, interact
    from ds4mlx.sampling import Sampler

    sampler = Sampler(temp, top_p, top_k, min_p, seed)
    loaded, tokenizer = open_model(model)
    interact(Conversation(loaded, tokenizer, sampler, think, system), max_tokens)


def open_model(path: str | None):
    """Load a model for the command line: bfloat16, or float32 where MLX has only the CPU."""
    import mlx.core as mx

    from ds4mlx.default_model import default_model
    from ds4mlx.load import load

    on_cpu = mx.default_device() == mx.cpu  # where bfloat16 is slower and less exact
    return load(path or default_model(), mx.float32 if on_cpu else mx.bfloat16)


def prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from exactly one of the two options."""
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give exactly one of -p and --prompt-file")
    if "-" in (prompt, prompt_file):
        return sys.stdin.read()
    if prompt_file is None:
        return prompt or ""
    try:
        return Path(prompt_file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{prompt_file}: not UTF-8 text") from None


def size(text: str) -> int:
    """Bytes of a size such as 512M or 1.5G."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is not a size such as 512M or 8G")
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])


def main() -> None:
    """Entry point: run a command and turn its end into an exit code."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    sys.exit(run(arguments, debug=len(arguments) < len(sys.argv) - 1))


def run(arguments: list[str], debug: bool = False) -> int:
    """Run one command line; its exit code."""
    try:
        code = app(arguments, prog_name="ds4mlx", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on
        return 0
    except Exception as error:  # noqa: BLE001 - every failure is one line
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage
            error.show()  # type: ignore[attr-defined]
            return 2
        if debug:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text if isinstance(error, DataError | OSError) else f"{type(error).__name__}: {text}"
