"""The command line: exit codes, what goes to stdout and what to stderr, and every option."""

import io
import json

import processes
import pytest

from ds4mlx import __version__, generate, stream_generate
from ds4mlx.chat import encode_messages
from ds4mlx.cli.main import run
from ds4mlx.engine.sampling import Sampler

PROMPT = "def add(a, b):"
COMMANDS = ["generate", "chat", "convert", "verify", "inspect", "imatrix", "bench", "synth", "eval"]


@pytest.fixture
def ask(talker_dir, capsys):
    """Runs `generate` in this process: exit code, stdout, stderr. Greedy and short, no reasoning."""

    def ask(*options):
        fixed = ["--temp", "0", "--max-tokens", "8", "--think", "none", "-m", str(talker_dir)]
        code = run(["generate", *fixed, *map(str, options)])
        return code, *capsys.readouterr()

    return ask


def encoded(text=PROMPT, system=None, **options):
    messages = [{"role": "system", "content": system}] if system else []
    return encode_messages([*messages, {"role": "user", "content": text}], **options)


def stdin(monkeypatch, raw):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))


# Exit codes and failures


def test_without_arguments_there_is_help(capsys):
    assert run([]) == 2
    out, err = capsys.readouterr()
    assert all(f"  {command}  " in out + err for command in COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS, "cache ls"])
def test_help(command, capsys):
    """Of every command; that of all of them cuts none of their descriptions."""
    assert run([*command.split(), "--help"]) == run([*command.split(), "-h"]) == 0
    out, err = capsys.readouterr()
    half = len(out) // 2
    assert out[:half] == out[half:] and out.startswith(f"Usage: ds4mlx {command}".strip())
    assert err == "" and "--debug" in out and "-h, --help" in out
    assert command or "..." not in out[:half].partition("\n")[2]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("cache", "doctor")])
def test_help_shows_an_example(command, capsys):
    assert run([command, "--help"]) == 0
    assert f"\n  ds4mlx {command} " in capsys.readouterr().out.partition("\n")[2]


def test_the_shell_completes_commands():
    asked = {"_DS4MLX_COMPLETE": "complete_bash", "COMP_WORDS": "ds4mlx gen", "COMP_CWORD": "1"}
    done = processes.run(**asked)
    assert (done.returncode, done.stdout) == (0, b"generate\n")


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr() == (f"ds4mlx {__version__}\n", "")


def test_debug_as_a_prompt(ask, talker):
    want = generate(*talker, "--debug", 8) + "\n"
    for arguments in (["-p", "--debug"], ["--prompt=--debug"], ["--", "--debug"]):
        assert ask("--raw", *arguments)[:2] == (0, want)


def test_the_command_is_also_a_module():
    """And failures of the real process look as they do here."""
    done = processes.run("inspect", "/nowhere")
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"error: /nowhere") and done.stderr.count(b"\n") == 1
    assert processes.run("nonsense").returncode == 2


# generate: the prompt


def test_the_text_goes_to_stdout_and_the_rest_to_stderr(ask, talker):
    code, out, err = ask("-p", PROMPT)
    assert code == 0
    assert out == generate(*talker, encoded(thinking="none"), 8) + "\n"
    assert err.startswith("[prompt ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("think", "system"),
    [("none", None), ("none", "Be brief."), ("low", None), ("high", "Be brief."), ("max", None)],
)
def test_chat_encoding(ask, talker, think, system):
    options = ["--system", system] if system else []
    _, out, _ = ask("-p", PROMPT, "--think", think, "--reasoning", "show", *options)
    words = "" if think == "none" else "Reasoning:\n"
    assert out == words + generate(*talker, encoded(system=system, thinking=think), 8) + "\n"


def test_raw(ask, talker):
    _, out, _ = ask("-p", PROMPT, "--raw")
    assert out == generate(*talker, PROMPT, 8) + "\n"


@pytest.mark.parametrize(
    ("options", "sent", "raw", "chat"),
    [
        (["-p", "-"], "a\r\nb 🦊\n", "a\r\nb 🦊\n", "a\r\nb 🦊"),
        (["--prompt-file", "-"], "a\n\n", "a\n\n", "a\n"),
        (["-"], "a\r\n", "a\r\n", "a"),
        ([], "a\n", "a\n", "a"),
        ([], " a ", " a ", " a "),
    ],
)
def test_a_prompt_from_stdin(ask, talker, monkeypatch, options, sent, raw, chat):
    """Byte for byte, but for the line end that closes it where it becomes a message."""
    stdin(monkeypatch, sent.encode())
    assert ask("--raw", *options)[1] == generate(*talker, raw, 8) + "\n"
    stdin(monkeypatch, sent.encode())
    assert ask(*options)[1] == generate(*talker, encoded(chat, thinking="none"), 8) + "\n"


def test_a_prompt_as_an_argument(ask, talker, monkeypatch):
    """Whatever standard input is."""
    stdin(monkeypatch, b"not read")
    want = generate(*talker, "a\n", 8) + "\n"
    for arguments in (["a\n"], ["-p", "a\n"], ["--prompt", "a\n"], ["--", "a\n"]):
        assert ask("--raw", *arguments)[1] == want


def test_no_prompt_at_all(ask, monkeypatch):
    stdin(monkeypatch, b"")
    code, out, err = ask()
    assert (code, out) == (2, "") and "there is no prompt" in err


def test_a_prompt_from_a_file(ask, talker, tmp_path):
    """Byte for byte, line ends included."""
    (tmp_path / "prompt").write_bytes("a\r\nb 🦊\n".encode())
    _, out, _ = ask("--raw", "--prompt-file", tmp_path / "prompt")
    assert out == generate(*talker, "a\r\nb 🦊\n", 8) + "\n"


def test_a_prompt_that_is_no_text(ask, tmp_path, monkeypatch):
    (tmp_path / "prompt").write_bytes(b"abc\xff")
    code, out, err = ask("--prompt-file", tmp_path / "prompt")
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path}/prompt: not UTF-8 text: invalid start byte at byte 3\n"
    stdin(monkeypatch, b"\xe6\xb7")
    assert ask("-p", "-")[2] == "error: stdin: not UTF-8 text: unexpected end of data at byte 0\n"
    for option in ([], ["--raw"]):
        code, out, err = ask("-p", "a\udcff", *option)
        assert (code, out) == (1, "") and err.startswith("error: ") and "Unicode" in err


def test_a_prompt_file_that_cannot_be_read(ask, tmp_path):
    assert ask("--prompt-file", tmp_path)[::2] == (1, f"error: {tmp_path}: Is a directory\n")


def test_an_empty_prompt(ask):
    assert ask("-p", "")[0] == 0
    assert ask("-p", "", "--raw") == (1, "", "error: the prompt is empty\n")


# generate: sampling and the end


def test_greedy_and_seeded_runs_repeat(ask):
    assert ask("-p", PROMPT)[1] == ask("-p", PROMPT)[1]
    drawn = [ask("-p", PROMPT, "--temp", "1", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_filters_reach_the_sampler(ask):
    """Each by itself leaves one token to draw from."""
    greedy = ask("-p", PROMPT)[1]
    for option in (["--top-k", "1"], ["--top-p", "0"], ["--min-p", "1"]):
        assert ask("-p", PROMPT, "--temp", "1", *option)[1] == greedy


def test_stop(ask, talker):
    whole = generate(*talker, PROMPT, 30)
    stop = whole[9:13]
    _, out, err = ask("-p", PROMPT, "--raw", "--max-tokens", "30", "--stop", "☃", "--stop", stop)
    assert out.rstrip("\n") == whole[: whole.index(stop)].rstrip("\n")
    assert "cut" not in err


def test_no_tokens(ask):
    assert ask("-p", PROMPT, "--max-tokens", "0") == (0, "", "")


def test_too_many_tokens(ask):
    code, out, err = ask("-p", PROMPT, "--max-tokens", "65536")
    assert (code, out) == (1, "") and "exceed the context of 65536" in err


def test_logprobs(ask, talker, tmp_path):
    code, _, _ = ask("-p", PROMPT, "--raw", "--logprobs", tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text("utf-8").splitlines()]
    seen = list(stream_generate(*talker, PROMPT, 8, sampler=Sampler(temperature=0)))
    assert code == 0 and [line["token"] for line in lines] == [r.token for r in seen]
    for line, response in zip(lines, seen, strict=True):
        top = line["top"]
        assert len(top) == 20 and {key: line[key] for key in top[0]} == top[0]
        chances = [entry["logprob"] for entry in top]
        assert chances == sorted(chances, reverse=True)
        assert sum(2.718281828**chance for chance in chances) <= 1 + 1e-6
        assert chances == pytest.approx(
            [response.logprobs[e["token"]].item() for e in top], abs=1e-4
        )
        for entry in top:
            assert bytes(entry["bytes"]) == talker[1].token_bytes(entry["token"])
            assert bytes(entry["bytes"]).decode(errors="replace") == entry["text"]


def test_a_logprobs_file_that_cannot_be_written_is_seen_first(ask, tmp_path):
    path = tmp_path / "none" / "log"
    assert ask("-p", PROMPT, "--logprobs", path, "-m", "/nowhere") == (
        *(1, ""),
        f"error: {path}: No such file or directory\n",
    )


# convert, inspect, verify


def test_a_dry_run_writes_nothing(small_source, tmp_path, capsys):
    target = tmp_path / "out"
    arguments = ["convert", str(small_source), str(target), "--dry-run"]
    assert run([*arguments, "--max-memory", "1.5MiB", "--release", "0731"]) == 0
    out, err = capsys.readouterr()
    assert not target.exists() and err == ""
    for kind in ("mxfp8", "mxfp4", "bf16", "f32", "i32"):
        assert kind in out


def test_convert_verify_inspect(small_source, tmp_path, capsys):
    target = tmp_path / "out"
    assert run(["convert", str(small_source), str(target), "--max-memory", "64K"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["verify", str(target), "--against", str(small_source), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert {line["error"] for line in checked} == {0.0}
    assert run(["inspect", str(target), "--json", "--tensors"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {t["name"] for t in found["tensors"]} == {line["name"] for line in checked}
    assert run(["inspect", str(target)]) == 0
    table = capsys.readouterr().out
    assert all(component in table for component in found["bytes_by_component"])
    assert run(["convert", str(small_source), str(target), "--recipe", "f32"]) == 1
    assert "--overwrite" in capsys.readouterr().err


# generate: what the answer must be


def test_the_answer_obeys_a_schema_and_the_reasoning_a_budget(ask, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],'
        ' "additionalProperties": false}'
    )
    options = ("--json-schema", schema, "--think", "high", "--think-budget", 4)
    code, out, _ = ask(PROMPT, *options, "--max-tokens", 40)
    assert code == 0 and json.loads(out)["a"] in (1, 2)


@pytest.mark.parametrize(
    ("text", "cause"),
    [("{", "not a JSON schema"), ('{"not": {}}', '"not"'), ("3", "must be an object")],
)
def test_a_schema_that_is_none_is_refused_by_its_file(ask, tmp_path, text, cause):
    schema = tmp_path / "schema.json"
    schema.write_text(text)
    code, out, err = ask(PROMPT, "--json-schema", schema)
    assert (code, out) == (1, "")
    assert str(schema) in err and cause in err and err.count("\n") == 1
    missing = tmp_path / "missing.json"
    assert (
        ask(PROMPT, "--json-schema", missing)[2] == f"error: {missing}: No such file or directory\n"
    )
