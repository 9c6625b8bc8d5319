"""The command line as a process: signals, and streams that are closed, full or unusual."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import processes
import pytest

from ds4mlx import stream_generate
from ds4mlx.cli.main import run
from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.weights.directory import JOURNAL, MANIFEST

PROMPT = "def add(a, b):"


def test_ctrl_c_ends_a_generation(talker_dir, talker):
    """What was made is on stdout, whole; the exit code says why there is no more."""
    options = ["--raw", "-p", PROMPT, "--temp", "0", "--max-tokens", "60000"]
    with processes.start("generate", "-m", talker_dir, *options) as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=processes.PATIENCE)
    text = (first + rest).decode()
    assert process.returncode == 130 and text.endswith("\n")
    assert err.startswith(b"[prompt ") and b"Traceback" not in err
    whole = ""
    for response in stream_generate(*talker, PROMPT, 60000):
        whole += response.text
        if len(whole) >= len(text):
            break
    assert whole.startswith(text.rstrip("\n"))


def test_ctrl_c_keeps_the_logprobs_so_far(talker_dir, tmp_path):
    options = ["--raw", "-p", "x", "--max-tokens", "60000", "--logprobs", tmp_path / "log"]
    with processes.start("generate", "-m", talker_dir, *options) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=processes.PATIENCE)
    lines = (tmp_path / "log").read_text("utf-8").splitlines()
    assert process.returncode == 130
    assert all(len(json.loads(line)["top"]) == 20 for line in lines)
    shown = int(re.search(rb"generated ([0-9]+) tokens", err)[1])
    assert len(lines) in (shown - 1, shown)  # Ctrl-C may come between showing and noting


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_ctrl_c_while_loading(talker_dir, tmp_path, command):
    """A configuration that is a pipe without a writer makes loading wait there."""
    model = shutil.copytree(talker_dir, tmp_path / "model")
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    options = ["-p", "x"] if command == "generate" else []
    interrupted_while_reading(model / "config.json", command, "-m", model, *options)


def test_ctrl_c_while_reading_the_prompt(tmp_path):
    os.mkfifo(tmp_path / "prompt")
    interrupted_while_reading(tmp_path / "prompt", "generate", "--prompt-file", tmp_path / "prompt")


def test_ctrl_c_does_not_wait_for_what_else_runs(tmp_path):
    """A download's threads, say, which Python joins before it ends."""
    os.mkfifo(tmp_path / "prompt")
    busy = "import threading; threading.Thread(target=threading.Event().wait).start()"
    code = f"{busy}\nfrom ds4mlx.cli.main import main\nmain()"
    arguments = ["generate", "--prompt-file", tmp_path / "prompt"]
    command = [sys.executable, "-c", code]
    interrupted_while_reading(tmp_path / "prompt", *arguments, command=command)


def interrupted_while_reading(fifo, *arguments, command=processes.COMMAND):
    """Start a command, interrupt it where it reads `fifo`, and look at its end."""
    started = processes.start(*arguments, command=command)
    with started as process, processes.writer(fifo, process):
        out, err = processes.interrupt(process)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_ctrl_c_during_a_conversion(small_source, tmp_path, capsys):
    arguments = ["convert", small_source, tmp_path]
    done = processes.run_dying(60, signal.SIGINT, *arguments)
    assert done.returncode == 130 and b"Traceback" not in done.stderr
    last = done.stderr.decode().splitlines()[-1]
    assert last == "interrupted; the same command goes on from here"
    assert (tmp_path / JOURNAL).exists() and not (tmp_path / MANIFEST).exists()
    assert run([*map(str, arguments)]) == 0 and run(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    "arguments",
    [["generate", "--raw", "-p", "x", "--max-tokens", "300"], ["inspect", EMBEDDED, "--tensors"]],
)
def test_a_reader_that_leaves_is_no_failure(talker_dir, arguments):
    """As in `ds4mlx ... | head -c 1`."""
    with processes.start(*arguments, DS4MLX_MODEL=talker_dir) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        code = process.wait(processes.PATIENCE)
    assert code == 0 and b"Traceback" not in err and b"BrokenPipe" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")  # noqa: PTH110
def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [*processes.COMMAND, "inspect", str(EMBEDDED)]
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device\n"


def test_a_terminal_that_cannot_show_every_character(talker_dir):
    options = ["-p", "x", "--seed", "1", "--max-tokens", "200", "--reasoning", "show"]
    done = processes.run("generate", "-m", talker_dir, *options, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"?" in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams(talker_dir, closed):
    command = " ".join([*processes.COMMAND, "chat", "--max-tokens", "3", "-m", str(talker_dir)])
    done = subprocess.run(
        ["bash", "-c", f"{command} {closed}"],
        check=False,
        input=b"one\n",
        capture_output=True,
        env=processes.environment(),
    )
    assert done.returncode == 0 and b"rror" not in done.stderr


def test_a_generation_on_a_terminal(talker_dir):
    """Progress that vanishes, then dim reasoning, then a line of numbers."""
    options = ["-p", "x", "--max-tokens", "3", "--seed", "1"]
    with processes.Terminal("generate", "-m", talker_dir, *options) as terminal:
        shown = terminal.until(r"\x1b\[2m.*\x1b\[0m\r\n\[prompt .* GB\]\r\n")
        code, rest = terminal.end()
    assert (code, rest) == (0, "")
    assert "loading: 1 of " in shown and "\r\x1b[K\x1b[2m" in shown
