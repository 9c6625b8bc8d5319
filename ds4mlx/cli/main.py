"""The command line. Each command calls one plain function; failures are one line on stderr.

Exit codes: 0 done, 1 data, model or environment at fault, 2 wrong usage, 130 interrupted.
"""

import contextlib
import io
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ds4mlx import __version__
from ds4mlx.chat import encode_messages
from ds4mlx.cli import arguments as arg
from ds4mlx.cli import cache_commands
from ds4mlx.cli.bench_commands import bench, synth
from ds4mlx.cli.chat import interact
from ds4mlx.cli.eval_commands import evaluate
from ds4mlx.cli.terminal import LogProbs, Printer, progress, show, timing
from ds4mlx.cli.weight_commands import convert, imatrix, inspect, verify
from ds4mlx.engine.conversation import Conversation
from ds4mlx.engine.generation import stream_generate
from ds4mlx.engine.sampling import Sampler
from ds4mlx.errors import DataError
from ds4mlx.text.stops import StopStrings

INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ds4mlx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of failures.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """DeepSeek-V4-Flash on MLX: convert the official weights, then generate or chat.

    ds4mlx convert deepseek-ai/DeepSeek-V4-Flash ~/models/v4-flash
    """


for command in (convert, verify, inspect, imatrix, bench, synth):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(cache_commands.app, name="cache")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text; - is stdin.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="File with the text; - is stdin.")] = None,
    model: arg.Model = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Feed the text without chat encoding.")
    ] = False,
    system: arg.System = None,
    think: arg.Think = "high",
    max_tokens: arg.MaxTokens = 4096,
    temp: arg.Temp = 1.0,
    top_p: arg.TopP = 1.0,
    top_k: arg.TopK = 0,
    min_p: arg.MinP = 0.0,
    seed: arg.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    logprobs: Annotated[Path | None, typer.Option(help="Write JSON lines, one a token.")] = None,
    kv_dir: arg.KvDir = None,
    kv_budget: arg.KvBudget = "16G",
    kv_text: arg.KvText = True,
) -> None:
    """Answer one prompt; text goes to stdout, a timing line to stderr."""
    if raw and system:
        raise typer.BadParameter("--system needs the chat encoding, which --raw leaves out")
    with arg.checked():
        sampler = Sampler(temp, top_p, top_k, min_p, seed)
        StopStrings(stop or ())
    arg.size(kv_budget)
    text = arg.prompt_text(prompt, prompt_file)
    with LogProbs(logprobs) as log, contextlib.ExitStack() as stack:
        loaded, tokenizer = arg.open_model(model)
        opened = arg.open_store(kv_dir, kv_budget, kv_text, (loaded, tokenizer), model)
        store = stack.enter_context(opened)
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
            on_prefill=partial(progress, "prompt", "tokens"),
            store=store,
        )
        printer = Printer(sys.stdout, reasoning=not raw and think != "none")
        last, interrupted = show(responses, printer, partial(log.add, tokenizer))
    if last is not None:
        print(timing(last), file=sys.stderr)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command()
def chat(
    model: arg.Model = None,
    system: arg.System = None,
    think: arg.Think = "high",
    max_tokens: arg.MaxTokens = 4096,
    temp: arg.Temp = 1.0,
    top_p: arg.TopP = 1.0,
    top_k: arg.TopK = 0,
    min_p: arg.MinP = 0.0,
    seed: arg.Seed = None,
    kv_dir: arg.KvDir = None,
    kv_budget: arg.KvBudget = "16G",
    kv_text: arg.KvText = True,
) -> None:
    """Talk with the model; Ctrl-C ends an answer, Ctrl-D the chat."""
    with arg.checked():
        sampler = Sampler(temp, top_p, top_k, min_p, seed)
    arg.size(kv_budget)
    loaded = arg.open_model(model)
    with arg.open_store(kv_dir, kv_budget, kv_text, loaded, model) as store:
        conversation = Conversation(*loaded, sampler, think, system, store)
        try:
            interact(conversation, max_tokens)
        finally:
            conversation.keep("shutdown")


def main() -> None:
    """Entry point: run a command and turn its end into an exit code."""
    _repair_streams()
    code = run(sys.argv[1:])
    if code == INTERRUPTED:
        _leave_at_once(code)
    sys.exit(code)


def _leave_at_once(code: int) -> None:
    """Exit without Python's own end, which waits for downloads and dies of a second Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code. `--debug` counts wherever it stands."""
    try:
        rest = [argument for argument in arguments if argument != "--debug"]
        code = app(rest, prog_name="ds4mlx", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except (BrokenPipeError, SystemExit):  # the second is what typer makes of the first
        _close_stdout()  # nobody reads on
        return 0
    except Exception as error:  # noqa: BLE001 - every failure is one line
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage
            error.show()  # type: ignore[attr-defined]
            return 2
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _close_stdout()  # or Python tries once more at its end, and fails its own way
        return 1


def _close_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text if isinstance(error, DataError | OSError) else f"{type(error).__name__}: {text}"


def _repair_streams() -> None:
    """Closed streams become empty ones, and what stdin or stdout cannot code becomes a mark."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - for the process
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
