"""A server found or started, an agent run with it, and both as a shell would do it."""

import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ds4mlx.cli import opening
from ds4mlx.cli.clients import FOLDER, KEY, KEY_VARIABLE, Client, Served, Setup
from ds4mlx.cli.terminal import note
from ds4mlx.errors import DataError

HOST = "127.0.0.1"
ANY_KEY = "ds4mlx"  # what a client sends to a server that asks for no key
# Seconds that a server has to say how it is, and to end.
_TO_ANSWER, _TO_END = 5, 50
# The exit codes of a server that is told to end; before it listens the signal ends it at once.
_ORDERLY = (0, -signal.SIGTERM)
_FORWARDED = (signal.SIGTERM, signal.SIGHUP)


def url_of(port: int) -> str:
    """Where the server of a port is."""
    return f"http://{HOST}:{port}"


def running(port: int) -> Served | None:
    """The server that answers on a port; None where nobody listens.

    Raises DataError where something else listens, or a server that does not let this user in.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=_TO_ANSWER)
    key = os.environ.get(KEY_VARIABLE) or ANY_KEY
    try:
        with contextlib.closing(connection):
            connection.request("GET", "/health", headers={"Authorization": f"Bearer {key}"})
            answer = connection.getresponse()
            status, told = answer.status, json.loads(answer.read(1 << 20))
    except ConnectionRefusedError:
        return None
    except (OSError, http.client.HTTPException, ValueError):
        status, told = 0, None
    if status == http.client.UNAUTHORIZED:
        raise DataError(f"the server on port {port} asks for a key: set ${KEY_VARIABLE} to it")
    if not isinstance(told, dict) or not {"model", "context", "status"} <= told.keys():
        raise DataError(f"port {port} is taken by something else; choose another with --port")
    if status != http.client.OK:
        raise DataError(f"the server on port {port} is {told['status']}; try again when it is gone")
    return Served(url_of(port), told["model"], told["context"])


@contextlib.contextmanager
def started(command: list[str], port: int) -> Iterator[Served]:
    """A server of our own until the block ends. Raises DataError, with its own words, if it fails.

    It is in a session of its own, so that Ctrl-C in a terminal is for the agent alone. Its log stays
    only where something failed.
    """
    handle, name = tempfile.mkstemp(prefix="ds4mlx-serve-", suffix=".log")
    note(f"a server is started on port {port}, which ends with the agent; its log is {name}")
    server, log, failed = _begun(command, handle), Path(name), False
    try:
        yield _listening(server, port, log)
    except Exception:
        failed = True
        raise
    finally:
        _end(server)
        if failed or server.returncode not in _ORDERLY:
            note(f"the server's log is kept: {log}")
        else:
            log.unlink(missing_ok=True)


def _begun(command: list[str], log: int) -> subprocess.Popen[str]:
    """The process of a server, which writes its log to a file descriptor."""
    with open(log, "w") as written:
        return subprocess.Popen(
            [sys.executable, "-m", "ds4mlx", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
            start_new_session=True,
        )


def _listening(server: subprocess.Popen[str], port: int, log: Path) -> Served:
    """The server, once it listens."""
    assert server.stdout is not None
    if not server.stdout.readline().startswith("listening on "):
        server.wait()
        said = log.read_text().strip().splitlines() or ["it said nothing"]
        raise DataError(f"the server did not start: {said[-1].removeprefix('error: ')}")
    served = running(port)
    if served is None:
        raise DataError("the server that was started does not answer")
    return served


def _end(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.wait(_TO_END)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    if server.stdout is not None:
        server.stdout.close()


def planned(model: str | None, port: int, ctx: int | None) -> Served:
    """The server that would be started."""
    return Served(url_of(port), opening.model_name(model), opening.context(model, ctx))


def find(client: Client) -> str:
    """The path of an agent's program. Raises DataError, saying how to install it."""
    program = shutil.which(client.command)
    if program is None:
        raise DataError(
            f"{client.command} is not installed: `npm install -g {client.package}` installs it"
        )
    return program


def run(client: Client, setup: Setup, arguments: list[str]) -> int:
    """Run an agent to its end; its exit code, as a shell gives it."""
    program = find(client)
    with tempfile.TemporaryDirectory(prefix="ds4mlx-launch-") as folder:
        for name, content in setup.files.items():
            (Path(folder) / name).write_text(content)
        words = [word.replace(FOLDER, folder) for word in setup.arguments]
        with _signals() as forward:
            agent = subprocess.Popen([program, *words, *arguments], env=_environment(setup))
            forward.append(agent)
            code = agent.wait()
    return code if code >= 0 else 128 - code


def _environment(setup: Setup) -> dict[str, str]:
    known = os.environ.get(KEY_VARIABLE) or ANY_KEY
    values = {**os.environ, **setup.variables}
    return {n: known if value == KEY else value for n, value in values.items() if value is not None}


@contextlib.contextmanager
def _signals() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Inside, Ctrl-C is the agent's own affair, and what ends this process ends the agent first."""
    agents: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        for agent in agents:
            agent.send_signal(number)

    # A function and not SIG_IGN, which the agent would inherit.
    before = {n: signal.signal(n, forward) for n in _FORWARDED}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield agents
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def script(client: Client, setup: Setup, arguments: list[str], server: list[str] | None) -> str:
    """What `launch` does, as commands for a shell. server: that is started first, if none runs."""
    lines = []
    if server is not None:
        lines += ["# no server answers: this one is started first, and ended at last"]
        lines += [f"{shlex.join(['ds4mlx', *server])} &", ""]
    if setup.files:
        lines.append("folder=$(mktemp -d)")
    for name, content in setup.files.items():
        lines += [f"cat > \"$folder/{name}\" <<'END'", f"{content}END"]
    unset = [word for n, value in setup.variables.items() if value is None for word in ("-u", n)]
    words = ["env", *unset, *_assignments(setup.variables), client.command]
    words += [*map(_word, setup.arguments), *map(shlex.quote, arguments)]
    return "\n".join([*lines, " \\\n    ".join(_in_pairs(words))])


def _assignments(variables: Mapping[str, str | None]) -> list[str]:
    key = f'"${KEY_VARIABLE}"' if os.environ.get(KEY_VARIABLE) else ANY_KEY
    given = {n: value for n, value in variables.items() if value is not None}
    return [f"{n}={key if value == KEY else shlex.quote(value)}" for n, value in given.items()]


def _word(word: str) -> str:
    return word.replace(FOLDER, '"$folder"') if FOLDER in word else shlex.quote(word)


def _in_pairs(words: list[str]) -> list[str]:
    """Options with their values, one a line."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].startswith("-") and " " not in joined[-1]:
            joined[-1] += f" {word}"
        else:
            joined.append(word)
    return joined
