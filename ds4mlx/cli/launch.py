"""The command that starts a coding agent on a local server, set up for this one run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from ds4mlx.cli import arguments as arg
from ds4mlx.cli import opening
from ds4mlx.cli.serve import PORT
from ds4mlx.errors import DataError


def launch(
    client: Annotated[
        Literal["claude", "codex", "opencode", "pi"], typer.Argument(help="The agent to start.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGS]", help="What the agent is to be given."),
    ] = None,
    model: arg.Model = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Where the server is, or is to be.")
    ] = PORT,
    ctx: Annotated[
        int | None,
        typer.Option(min=2, help="The most tokens of a server that is started."),
    ] = None,
    adapter: arg.Adapter = None,
    kv_dir: arg.KvDir = None,
    kv: arg.Kv = False,
    show: Annotated[
        bool, typer.Option("--print", help="Show what would be done, and do nothing.")
    ] = False,
) -> None:
    """Start a coding agent on a server of this machine, set up for this run only.

    \b
    ds4mlx launch claude -m ~/models/v4-flash --kv
    ds4mlx launch codex -- exec "Write a test for parse.py."

    A server that answers on the port is used as it is; otherwise one is started, and ended when the
    agent ends. The agent's own configuration is left alone. A server with a key needs it in
    $DS4MLX_API_KEY.
    """
    from ds4mlx.cli import launching
    from ds4mlx.cli.clients import CLIENTS

    chosen, given = CLIENTS[client], arguments or []
    served = launching.running(port)
    if served is not None:
        _check_same(served.model, model, adapter, port)
    server = _server(
        port, kv, {"-m": model, "--ctx": ctx, "--adapter": adapter, "--kv-dir": kv_dir}
    )
    if show:
        planned = served or launching.planned(model, port, ctx)
        started = None if served else server
        print(launching.script(chosen, chosen.setup(planned), given, started))
        return
    launching.find(chosen)
    if served is not None:
        code = launching.run(chosen, chosen.setup(served), given)
    else:
        with launching.started(server, port) as served:
            code = launching.run(chosen, chosen.setup(served), given)
    raise typer.Exit(code)


def _server(port: int, kv: bool, options: Mapping[str, object]) -> list[str]:
    """The command of a server to be started; options that are None are left out."""
    told = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    return ["serve", "--port", str(port), *told, *(["--kv"] if kv else [])]


def _check_same(served: str, wanted: str | None, adapter: Path | None, port: int) -> None:
    if adapter is not None:
        raise DataError(
            f"a server runs on port {port}, and does not say which adapter it has: choose another "
            "port with --port, or leave --adapter out"
        )
    if wanted is not None and opening.model_name(wanted) != served:
        raise DataError(
            f"the server on port {port} has {served} and not {opening.model_name(wanted)}: choose "
            "another port with --port, or leave -m out"
        )
