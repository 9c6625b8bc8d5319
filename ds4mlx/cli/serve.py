"""The command that serves a model by HTTP, to coding agents and to a page for people."""

import importlib.util
import logging
import re
import sys
from typing import Annotated

import typer

from ds4mlx.cli import arguments as arg
from ds4mlx.cli import opening
from ds4mlx.cli import steered as steering
from ds4mlx.errors import DataError

PORT = 8765
MOST_TOGETHER = 8
# As browsers write origins, which they never do with the usual port of a scheme.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_USUAL_PORT = re.compile(r"http://.*:80|https://.*:443")


def _origin(given: str | None) -> str | None:
    """What may stand behind --cors: what a page's request may have as its Origin, or any."""
    if given in (None, "*", "null"):
        return given
    if not _ORIGIN.fullmatch(given) or _USUAL_PORT.fullmatch(given):
        raise typer.BadParameter(
            f"{given!r} is no origin as browsers send it: a scheme and a host, such as "
            "https://page.example or http://localhost:3000, in lower case, with no usual port and "
            "nothing behind"
        )
    return given


def serve(
    model: arg.Model = None,
    adapter: arg.Adapter = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")
    ] = PORT,
    ctx: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="The most tokens of a prompt and its answer; by default what fits into the memory.",
        ),
    ] = None,
    kv_dir: arg.KvDir = None,
    kv: arg.Kv = False,
    kv_budget: arg.KvBudget = "16G",
    kv_text: arg.KvText = True,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="DS4MLX_API_KEY", help="What clients must send as a bearer token or x-api-key."
        ),
    ] = None,
    cors: Annotated[
        str | None,
        typer.Option(
            metavar="[ORIGIN]",
            callback=_origin,
            help="Let web pages of this origin ask; without one, all pages.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name of this server in requests; may be repeated."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, max=MOST_TOGETHER, help="The most answers that go on together.")
    ] = MOST_TOGETHER,
    max_queue: Annotated[int, typer.Option(min=0, help="The most requests that wait.")] = 32,
    dtype: Annotated[
        arg.Dtype | None,
        typer.Option(help="What to compute in; by default bfloat16, on a CPU float32."),
    ] = None,
    steer: steering.File = None,
    steer_scale: steering.Scale = None,
    steer_layers: steering.Layers = None,
    steer_operation: steering.Operation = None,
    steer_site: steering.Site = None,
    aligned: Annotated[
        bool,
        typer.Option(
            "--aligned", help="Let no answer depend on others: fixed chunks, no prefix reuse."
        ),
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen beyond this machine although there is no key."),
    ] = False,
) -> None:
    """Serve the model by HTTP, in the protocols of OpenAI and Anthropic, with a page at /.

    \b
    ds4mlx serve -m ~/models/v4-flash --kv
    ds4mlx serve -m ~/models/v4-flash --host 0.0.0.0 --api-key "$KEY" --ctx 200000

    `listening on http://HOST:PORT` on standard output says that it answers. SIGTERM, Ctrl-C
    or closing the terminal ends the answers, saves what was read, and leaves; a second SIGTERM or
    Ctrl-C leaves at once.
    """
    arg.size(kv_budget)
    _check_installed()

    from ds4mlx.server import process
    from ds4mlx.server.app import create_app
    from ds4mlx.server.safety import Limits, is_loopback

    if not (api_key or insecure or is_loopback(host)):
        process.addresses(host, port)  # or a misspelled name is said to be reached from elsewhere
        raise typer.BadParameter(
            f"{host} can be reached from other machines, so --api-key is needed, or --insecure",
            param_hint="--host",
        )
    steered = steering.steered(model, steer, steer_scale, steer_layers, steer_operation, steer_site)
    _log_to_stderr()
    limits = Limits()
    with process.open_socket(host, port) as opened:
        ctx = opening.context(model, ctx, dtype)
        loaded = opening.open_model(model, dtype, context=ctx, adapter=adapter)
        opened_store = opening.open_store(kv_dir, kv, kv_budget, kv_text, loaded, model)
        with steered(loaded[0]), opened_store as store:
            app = create_app(
                *loaded,
                name=opening.model_name(model),
                store=store,
                context=ctx,
                max_batch=max_batch,
                max_queue=max_queue,
                aligned=aligned,
                key=api_key or None,
                hosts=[host, *(allow_host or ())],
                origins=[cors] if cors else (),
                limits=limits,
            )
            code = process.run(app, opened, limits)
            sys.stdout.flush()
    if code:
        raise typer.Exit(code)


def _check_installed() -> None:
    missing = [name for name in _needed() if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(
            f"serving needs {', '.join(missing)}, which `pip install 'ds4mlx[server]'` installs"
        )


def _needed() -> tuple[str, ...]:
    return ("starlette", "uvicorn", "h11", "sse_starlette", "prometheus_client", "llguidance")


def _log_to_stderr() -> None:
    """What the server has to say of each request, a line each."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("ds4mlx").setLevel(logging.INFO)
