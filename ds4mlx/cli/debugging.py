"""`--debug`, an option of every command: whether a failure shows its traceback."""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Annotated, Any

import typer

_asked: ContextVar[bool] = ContextVar("debug", default=False)


def _note(wanted: bool) -> None:
    if wanted:
        _asked.set(True)


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_note, is_eager=True, help="Show the traceback when the command fails."
    ),
]


def forget() -> None:
    """Begin a command line: nobody has asked for tracebacks yet."""
    _asked.set(False)


def asked() -> bool:
    """Whether `--debug` stands in the command line as an option, not as the value of one."""
    return _asked.get()


def debuggable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The command with `--debug` as its last option, so that the option may follow its name too.

    A file that may not be read is no wrong usage, as Typer would have it: the command says so itself.
    """

    @functools.wraps(function)
    def call(*args: Any, debug: bool = False, **options: Any) -> Any:
        return function(*args, **options)

    usual = inspect.signature(function, eval_str=True)
    for each in usual.parameters.values():
        for info in getattr(each.annotation, "__metadata__", ()):
            info.readable = False
    last = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
    )
    call.__signature__ = usual.replace(parameters=[*usual.parameters.values(), last])  # type: ignore[attr-defined]
    call.__annotations__ = {name: each.annotation for name, each in usual.parameters.items()}
    call.__annotations__ |= {"debug": Debug, "return": usual.return_annotation}
    return call
