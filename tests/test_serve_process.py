"""`ds4mlx serve` as a process: where it listens, and how it ends."""

import http.client
import json
import os
import re
import signal
import socket
from pathlib import Path

import processes
import pytest

from ds4mlx.cli.main import run
from ds4mlx.engine.scheduler import Scheduler

QUESTION = {"messages": [{"role": "user", "content": "x"}], "stream": True}


class Serving:
    """The command, and what it says."""

    def __init__(self, *arguments, command=processes.COMMAND):
        self.process = processes.start("serve", "--port", "0", *arguments, command=command)
        line = self.process.stdout.readline().decode()
        found = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)\n", line)
        assert found, line + self.process.stderr.read().decode()
        self.port = int(found[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()

    def stream(self, path="/v1/chat/completions", body=QUESTION):
        """A stream whose first event is there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=processes.PATIENCE)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        assert answer.status == 200
        text_of(answer)
        return answer

    def end(self, *signals):
        """Send the signals; (exit code, standard output, standard error)."""
        for number in signals:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=processes.PATIENCE)
        return self.process.returncode, out.decode(), err.decode()


def text_of(answer):
    """Read up to an event that brings text."""
    while line := answer.readline():
        if b"reasoning_content" in line or b"text_delta" in line:
            return
    raise AssertionError("the stream ends without a text")


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), (signal.SIGHUP, signal.SIGHUP), (signal.SIGHUP, signal.SIGTERM)],
    ids=["SIGTERM", "a closed terminal", "a session that ends"],
)
def test_a_signal_ends_the_streams_and_saves(talker_dir, tmp_path, signals):
    """Each stream ends with an error of its protocol; the states are there for the next server."""
    message = {"messages": QUESTION["messages"], "stream": True, "max_tokens": 9999}
    long = QUESTION | {"messages": [{"role": "user", "content": "def f(x): " * 150}]}
    with Serving("-m", talker_dir, "--kv-dir", tmp_path) as serving:
        chat = serving.stream(body=long)
        messages = serving.stream("/v1/messages", message)
        code, out, err = serving.end(*signals)
        assert (code, out) == (0, "") and "Traceback" not in err and "def f" not in err
        last = chat.read().decode().strip().splitlines()[-1]
        assert "stopping" in json.loads(last.removeprefix("data: "))["error"]["message"]
        *_, name, last = messages.read().decode().strip().splitlines()
        assert name == "event: error"
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "overloaded_error"
    with Serving("-m", talker_dir, "--kv-dir", tmp_path) as serving:
        options = {"stream": False, "max_tokens": 1}
        connection = http.client.HTTPConnection("127.0.0.1", serving.port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(long | options), headers)
        answer = json.loads(connection.getresponse().read())
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 512
        assert answer["ds4mlx"]["source"] == "store"


@pytest.mark.parametrize(
    ("signals", "expected"),
    [((signal.SIGINT,), 130), ((signal.SIGTERM, signal.SIGINT), 130)],
    ids=["Ctrl-C", "a second signal"],
)
def test_other_ends(talker_dir, signals, expected):
    with Serving("-m", talker_dir) as serving:
        serving.stream()
        code, out, err = serving.end(*signals)
        assert (code, out) == (expected, "") and "Traceback" not in err


def test_a_terminal_that_closes_under_it(talker_dir, tmp_path):
    """Nothing can be written any more, and all is saved."""
    with processes.Terminal("serve", "-m", talker_dir, "--port", "0", "--kv-dir", tmp_path) as on:
        address = on.until(r"listening on http://[\d.:]+\r").removesuffix("\r").split("http://")[1]
        connection = http.client.HTTPConnection(address, timeout=processes.PATIENCE)
        body = json.dumps({"prompt": "def f(x): " * 150, "max_tokens": 1})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 200
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), on.master)
        assert on.process.wait(processes.PATIENCE) == 0
    assert any((tmp_path / "records").iterdir())


def test_nohup_keeps_it_running(talker_dir):
    command = ["nohup", *processes.COMMAND]
    with Serving("-m", talker_dir, command=command) as serving:
        serving.process.send_signal(signal.SIGHUP)
        connection = http.client.HTTPConnection("127.0.0.1", serving.port)
        body = json.dumps({"prompt": "def f(", "max_tokens": 40})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 200
        assert serving.end(signal.SIGTERM)[0] == 0


def test_a_scheduler_that_is_closed(talker):
    """Only then may its store be closed, too."""
    scheduler = Scheduler(*talker)
    scheduler.start()
    assert not scheduler.closed
    scheduler.close(processes.PATIENCE)
    assert scheduler.closed


def test_a_port_that_is_taken(talker_dir, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "-m", str(talker_dir), "--port", str(port)]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot listen on 127.0.0.1:{port}: ")


@pytest.mark.parametrize("host", ["nosuch.invalid", "no..such"])
@pytest.mark.parametrize("options", [[], ["--insecure"]], ids=["no key", "insecure"])
def test_a_host_that_there_is_not(host, options, capsys):
    """Is no matter of keys."""
    assert run(["serve", "-m", "nowhere", "--host", host, "--port", "0", *options]) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        f"error: cannot listen on {host}:0: the name '{host}' cannot be resolved ("
    )


def test_a_context_beyond_the_model_s_own_is_cut(talker_dir):
    with Serving("-m", str(talker_dir), "--ctx", "70000") as serving:
        connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=5)
        connection.request("GET", "/v1/models")
        (model,) = json.load(connection.getresponse())["data"]
        assert model["context_window"] == model["max_model_len"] == 65536
        _, _, err = serving.end(signal.SIGTERM)
    said = "note: a context of 70,000 tokens is cut to the model's own, 65,536"
    assert err.splitlines().count(said) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-batch", "9"], "--max-batch"),
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "::"], "--api-key"),
        (["--port", "70000"], "--port"),
        (["--dtype", "float16"], "--dtype"),
        (["--kv-budget", "much"], "much"),
        (["--cors", "--max-batch", "0"], "--max-batch"),
        (["--cors", "https://page.example", "--max-batch", "0"], "--max-batch"),
        (["--cors", "http://[::1]:3000", "--max-batch", "0"], "--max-batch"),
        (["--cors", "vscode-webview://0c1b", "--max-batch", "0"], "--max-batch"),
        *(
            (["--cors", wrong], "is no origin")
            for wrong in (
                *("page.example", "localhost:3000", "https://page.example/", "http://a b", ""),
                *("https://page.example/x", "https://page.example:443", "HTTPS://page.example"),
                *("https://you@page.example", "https://*.page.example", "https://page.example:x"),
            )
        ),
    ],
)
def test_wrong_usage_is_said_before_a_model_is_loaded(options, words, capsys):
    assert run(["serve", "-m", "nowhere", *options]) == 2
    assert words in capsys.readouterr().err
