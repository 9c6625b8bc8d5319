"""`ds4mlx launch`: what an agent is started with, and that nothing of the user's is touched.

The agents are stand-ins, programs of their names that write down how they were started.
"""

import http.server
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import agent
import processes
import pytest

from ds4mlx.cli import opening
from ds4mlx.cli.clients import CLIENTS, Served
from ds4mlx.cli.main import run

ROOT = Path(__file__).parents[1]
FLASH = {"status": "ok", "model": "v4-q2", "context": 1 << 20}


class Answers(http.server.BaseHTTPRequestHandler):
    """Says of itself what its server's `told` is; asks for its `key`, if it has one."""

    def do_GET(self):
        key = self.server.key
        good = key is None or self.headers["Authorization"] == f"Bearer {key}"
        body = json.dumps(self.server.told).encode()
        self.send_response((self.server.status if good else 401) if self.path == "/health" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def answering():
    """Something that listens on a port, which `answering.server_port` is."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.told, server.status, server.key = FLASH, 200, None
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A home with an agent's configuration in it, and a PATH with nothing but stand-ins first."""
    home, programs = tmp_path / "home", tmp_path / "bin"
    programs.mkdir()
    for name in CLIENTS:
        (home / f".{name}").mkdir(parents=True)
        (home / f".{name}" / "config.toml").write_text("mine = true\n")
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {agent.__file__} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record.json"))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of the user")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # What $TMPDIR said when it was asked for.
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("DS4MLX_API_KEY", raising=False)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recorded(stage):
    """What a stand-in wrote down, without what differs from shell to shell."""
    told = json.loads((stage / "record.json").read_text())
    (stage / "record.json").unlink()
    for name in ("_", "SHLVL", "PWD", "OLDPWD", "BASH_FUNC_x%%"):
        told["variables"].pop(name, None)
    told["arguments"] = [re.sub(r"^/.*/", "", word) for word in told["arguments"]]
    return told


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


# What an agent is started with


@pytest.mark.parametrize("name", [*CLIENTS])
def test_what_is_printed_is_what_is_done(name, stage, answering, capsys):
    """A shell that runs what is printed starts the agent with the same words, variables and files."""
    before, port = contents(stage / "home"), str(answering.server_port)
    given = ["--", "-p", "What is in 'a b.py'?", "--print"]
    assert run(["launch", name, "--port", port, *given]) == 0
    launched = recorded(stage)
    assert contents(stage / "home") == before
    capsys.readouterr()
    assert run(["launch", name, "--port", port, "--print", *given]) == 0
    printed = capsys.readouterr().out
    assert not (stage / "record.json").exists() and contents(stage / "home") == before
    subprocess.run(["bash", "-euc", printed], check=True, env=dict(os.environ))
    assert recorded(stage) == launched
    assert launched["arguments"][-3:] == given[1:] and launched["interrupts"]
    assert launched["variables"]["HOME"] == str(stage / "home")


@pytest.mark.parametrize("name", [*CLIENTS])
def test_the_page_shows_what_is_done(name, answering, capsys, monkeypatch):
    """Of a server of Flash at its default port."""
    monkeypatch.delenv("DS4MLX_API_KEY", raising=False)
    assert run(["launch", name, "--port", str(answering.server_port), "--print"]) == 0
    out = capsys.readouterr().out.replace(str(answering.server_port), "8765")
    assert f"```sh\n{out}```" in (ROOT / "docs" / "agents.md").read_text()


def test_claude_is_told_the_window_and_one_model_for_all(stage, answering):
    assert run(["launch", "claude", "--port", str(answering.server_port)]) == 0
    variables = recorded(stage)["variables"]
    assert "ANTHROPIC_API_KEY" not in variables and variables["ANTHROPIC_AUTH_TOKEN"]
    assert variables["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{answering.server_port}"
    models = {v for n, v in variables.items() if n.startswith("ANTHROPIC") and n.endswith("MODEL")}
    assert models == {"v4-q2"}
    assert variables["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] == str(1 << 20)


def test_the_configuration_of_codex_is_toml():
    words = CLIENTS["codex"].setup(Served("http://127.0.0.1:1", 'a "b"', 100_000)).arguments
    assert words[::2] == ("-c",) * (len(words) // 2)
    told = tomllib.loads("\n".join(words[1::2]))
    assert told["model"] == 'a "b"' and told["model_provider"] in told["model_providers"]
    provider = told["model_providers"]["ds4mlx"]
    assert (provider["base_url"], provider["wire_api"]) == ("http://127.0.0.1:1/v1", "responses")
    assert told["model_auto_compact_token_limit"] + 25_000 < told["model_context_window"] == 100_000


@pytest.mark.parametrize("name", [*CLIENTS])
@pytest.mark.parametrize("context", [4096, 131_072, 1 << 20])
def test_an_answer_fits_beside_the_history(name, context):
    served = Served("http://127.0.0.1:1", "m", context)
    assert served.full > 0 and served.full + served.answer < context
    setup = CLIENTS[name].setup(served)
    told = " ".join([*setup.arguments, *map(str, setup.variables.values()), *setup.files.values()])
    assert str(context) in told and "http://127.0.0.1:1" in told


# Servers


def test_a_key_is_the_users(stage, answering, capsys, monkeypatch):
    """It goes to the agent, and is not printed."""
    answering.key, port = "secret", str(answering.server_port)
    assert run(["launch", "codex", "--port", port]) == 1
    assert "asks for a key: set $DS4MLX_API_KEY to it" in capsys.readouterr().err
    monkeypatch.setenv("DS4MLX_API_KEY", "secret")
    for name, variable in (("codex", "DS4MLX_API_KEY"), ("claude", "ANTHROPIC_AUTH_TOKEN")):
        assert run(["launch", name, "--port", port]) == 0
        assert recorded(stage)["variables"][variable] == "secret"
        assert run(["launch", name, "--port", port, "--print"]) == 0
        assert "secret" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "status", "options", "message"),
    [
        ({"hello": 1}, 200, [], "is taken by something else; choose another with --port"),
        ([1], 200, [], "is taken by something else"),
        (FLASH, 200, ["-m", "~/models/other"], "has v4-q2 and not other: choose another port"),
        (FLASH | {"status": "stopping"}, 503, [], "is stopping; try again when it is gone"),
    ],
)
def test_a_server_that_will_not_do(told, status, options, message, stage, answering, capsys):
    answering.told, answering.status = told, status
    assert run(["launch", "pi", "--port", str(answering.server_port), *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not (stage / "record.json").exists()


def test_the_same_model_by_another_path_will_do(stage, answering):
    port = str(answering.server_port)
    assert run(["launch", "pi", "-m", "/elsewhere/v4-q2", "--port", port]) == 0


def test_an_agent_that_is_not_there(stage, answering, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(stage))
    assert run(["launch", "opencode", "--port", str(answering.server_port)]) == 1
    err = capsys.readouterr().err
    assert err == "error: opencode is not installed: `npm install -g opencode-ai` installs it\n"


@pytest.fixture
def launched(stage):
    """Starts `launch` as a process in a session of its own; its stand-in waits for Ctrl-C."""
    begun = []

    def launched(name, *options, **changes):
        command = [*processes.COMMAND, "launch", name, *map(str, options)]
        environment = processes.environment(WAIT=1, **changes)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        begun.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        deadline = time.monotonic() + processes.PATIENCE
        while not (stage / "record.json").exists() and begun[-1].poll() is None:
            assert time.monotonic() < deadline
        return begun[-1]

    yield launched
    for process in begun:
        process.kill()
        process.communicate()


def test_a_server_is_started_and_ended(launched, stage, talker_dir):
    """And Ctrl-C in between is the agent's own affair."""
    before, port = contents(stage / "home"), free_port()
    options = ["-m", talker_dir, "--ctx", 5000, "--port", port]
    process = launched("claude", *options, ASK=f"http://127.0.0.1:{port}")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=processes.PATIENCE)
    assert process.returncode == 3 and f"started on port {port}" in err.decode()
    assert logs(stage) == []
    told = recorded(stage)
    assert (told["health"]["model"], told["health"]["context"]) == (talker_dir.name, 5000)
    assert told["variables"]["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] == "5000"
    with socket.socket() as tried:
        assert tried.connect_ex(("127.0.0.1", port)) != 0
    assert contents(stage / "home") == before


def test_the_log_of_a_server_that_dies_is_kept(launched, stage, talker_dir):
    port = free_port()
    process = launched("claude", "-m", talker_dir, "--port", port, ASK=f"http://127.0.0.1:{port}")
    os.kill(child(process.pid, "serve"), signal.SIGKILL)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=processes.PATIENCE)
    (log,) = logs(stage)
    assert process.returncode == 3
    assert err.decode().splitlines()[-1] == f"the server's log is kept: {log}"


def logs(stage):
    return [*stage.glob("ds4mlx-serve-*.log")]


def child(parent, word):
    """The process that another one has started with this word on its command line."""
    told = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, check=True)
    lines = [line.split() for line in told.stdout.decode().splitlines()]
    (found,) = [int(own) for own, of, *words in lines if int(of) == parent and word in words]
    return found


def test_what_ends_launch_ends_the_agent(launched, answering):
    process = launched("codex", "--port", answering.server_port)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=processes.PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_server_that_does_not_start(stage, capsys):
    missing = str(stage / "nothing")
    assert run(["launch", "pi", "-m", missing, "--port", str(free_port())]) == 1
    out, err = capsys.readouterr()
    assert out == "" and not (stage / "record.json").exists()
    last = err.splitlines()[-1]
    assert last == f"error: the server did not start: {missing}: no such directory"
    (log,) = logs(stage)
    assert f"the server's log is kept: {log}" in err and missing in log.read_text()


def test_an_adapter_is_for_a_server_that_is_started(answering, capsys):
    port = str(answering.server_port)
    assert run(["launch", "codex", "--port", port, "--adapter", "mine", "--print"]) == 1
    assert "does not say which adapter it has" in capsys.readouterr().err


def test_the_plan_without_a_server(stage, talker_dir, capsys):
    """Has the server's own command, and the context that it would take."""
    port = str(free_port())
    options = ["--port", port, "-m", str(talker_dir), "--kv", "--print"]
    assert run(["launch", "codex", *options]) == 0
    out = capsys.readouterr().out
    first, second = out.splitlines()[:2]
    assert first.startswith("# no server answers")
    assert second == shlex.join(
        ["ds4mlx", "serve", "--port", port, "-m", str(talker_dir), "--kv", "&"]
    ).replace("'&'", "&")
    assert "model_context_window=65536" in out and "ds4mlx.name" in out
    assert run(["launch", "codex", "--adapter", "mine", *options]) == 0
    assert "--adapter mine" in capsys.readouterr().out
    assert run(["launch", "codex", "--ctx", "3000", *options]) == 0
    assert "model_context_window=3000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "name"),
    [(".", "in"), ("..", "v4-q2"), ("../", "v4-q2"), ("x/v4", "v4"), (None, "embedded")],
)
def test_a_model_has_the_name_of_its_directory(tmp_path, monkeypatch, named, name):
    monkeypatch.delenv("DS4MLX_MODEL", raising=False)
    (tmp_path / "v4-q2" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "v4-q2" / "in")
    assert opening.model_name(named) == name
