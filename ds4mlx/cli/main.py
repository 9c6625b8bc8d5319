"""The command line. Each command calls one plain function; failures are one line on stderr.

Exit codes: 0 done, 1 data, model or environment at fault, 2 wrong usage, 130 interrupted. A command
imports what it needs when it runs, so that the help and the version are there without MLX too.
"""

import contextlib
import io
import os
import sys
import traceback
from typing import Annotated

import typer

from ds4mlx import __version__
from ds4mlx.cli import cache_commands, debugging
from ds4mlx.cli.bench_commands import bench, synth
from ds4mlx.cli.doctor import doctor
from ds4mlx.cli.eval_commands import evaluate, sensitivity
from ds4mlx.cli.help import Commands
from ds4mlx.cli.launch import launch
from ds4mlx.cli.optional import WithOptionalValues
from ds4mlx.cli.serve import serve
from ds4mlx.cli.text_commands import chat, generate
from ds4mlx.cli.weight_commands import convert, imatrix, inspect, merge, verify
from ds4mlx.engine.machine import mlx_fault
from ds4mlx.errors import DataError

INTERRUPTED = 130

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ds4mlx {__version__}")
        raise typer.Exit


@app.callback()
@debugging.debuggable
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """DeepSeek-V4-Flash on MLX: convert the official weights, then generate or chat.

    \b
    ds4mlx convert deepseek-ai/DeepSeek-V4-Flash ~/models/v4-flash
    ds4mlx generate -m ~/models/v4-flash "Why is the sky blue?"
    """


weights = convert, merge, verify, inspect, imatrix, sensitivity
for command in (generate, chat, *weights, bench, synth, doctor):
    app.command()(debugging.debuggable(command))
app.command(cls=WithOptionalValues)(debugging.debuggable(serve))
app.command()(debugging.debuggable(launch))
app.command("eval")(debugging.debuggable(evaluate))
for registered in cache_commands.app.registered_commands:
    assert registered.callback is not None
    registered.callback = debugging.debuggable(registered.callback)
cache_commands.app.callback()(debugging.debuggable(lambda: None))
app.add_typer(cache_commands.app, name="cache", cls=Commands)


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
    """Run one command line; its exit code."""
    debugging.forget()
    try:
        code = app(arguments, prog_name="ds4mlx", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return _nobody_reads()
    except SystemExit as end:
        # Typer makes one of a broken pipe; any other says itself how the command ended.
        return _nobody_reads() if isinstance(end.__context__, BrokenPipeError) else _code(end)
    except Exception as error:  # noqa: BLE001 - every failure is one line
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage
            error.show()  # type: ignore[attr-defined]
            return 2
        if debugging.asked():
            traceback.print_exc()
        return _failed(_one_line(error))


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _close_stdout()  # or Python tries once more at its end, and fails its own way
    return 1


def _code(end: SystemExit) -> int:
    """The exit code that Python itself would leave with."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    return _failed(" ".join(str(end.code).split()))


def _nobody_reads() -> int:
    _close_stdout()
    return 0


def _close_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ImportError):
        return mlx_fault() or f"ImportError: {text}"
    return text if isinstance(error, DataError | OSError) else f"{type(error).__name__}: {text}"


def _repair_streams() -> None:
    """Closed streams become empty ones, and what stdin or stdout cannot code becomes a mark."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - for the process
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
