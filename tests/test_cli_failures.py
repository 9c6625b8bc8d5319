"""What commands say of wrong usage, and the codes with which they end."""

import pytest
import typer

from ds4mlx import DataError
from ds4mlx.cli.main import run


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "-p"],
        ["generate", "-p", "a", "--prompt-file", "b"],
        ["generate", "-p", "a", "--raw", "--system", "b"],
        ["generate", "-p", "a", "--temp", "-1"],
        ["generate", "-p", "a", "--temp", "nan"],
        ["generate", "-p", "a", "--temp", "warm"],
        ["generate", "-p", "a", "--top-p", "1.1"],
        ["generate", "-p", "a", "--top-k", "-1"],
        ["generate", "-p", "a", "--min-p", "2"],
        ["generate", "-p", "a", "--seed", "-1"],
        ["generate", "-p", "a", "--max-tokens", "-1"],
        ["generate", "-p", "a", "--think", "much"],
        ["generate", "-p", "a", "--stop", ""],
        ["generate", "-p", "a", "--nonsense"],
        ["generate", "a", "-p", "b"],
        ["generate", "a", "--prompt-file", "b"],
        ["generate", "a", "b"],
        ["generate", "-p", "a", "--reasoning", "dim"],
        ["chat", "--top-p", "-1"],
        ["chat", "-m", ""],
        ["bench", "-m", " "],
        ["eval", "--model="],
        ["imatrix", "-m", "", "--prompts", "a", "-o", "b"],
        ["bench", "--prompt", "0"],
        ["bench", "--prompt", "²"],
        ["bench", "--prompt", "1,"],
        ["bench", "--prompt", "9" * 20],
        ["--nonsense"],
        ["cache", "nonsense"],
        ["--debug", "nonsense"],
        ["chat", "extra"],
        ["convert", "a"],
        ["convert", "a", "b", "--recipe", "q9"],
        ["convert", "a", "b", "--release", "may"],
        ["convert", "a", "b", "--max-memory", "lots"],
        ["convert", "a", "b", "--max-memory", "0"],
        ["convert", "a", "b", "--max-memory", "-1G"],
        ["convert", "a", "b", "--max-memory", "0.0001K"],
        ["verify"],
        ["inspect"],
        ["imatrix", "--prompts", "a"],
        ["imatrix", "-o", "a"],
        ["imatrix", "--prompts", "a", "-o", "b", "--ctx", "1"],
        ["imatrix", "--prompts", "a", "-o", "b", "--max-tokens", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments, capsys):
    """Told before any model is looked for: there is none here."""
    assert run([*arguments, "-m", "/nowhere"] if arguments[0] == "generate" else arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Usage: ds4mlx")
    assert "Error: " in err and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-p", "a", "-m", "/nowhere"],
        ["chat", "-m", "/nowhere"],
        ["verify", "/nowhere"],
        ["inspect", "/nowhere"],
        ["convert", "/nowhere", "/nowhere/either"],
        ["generate", "--prompt-file", "/nowhere"],
        ["imatrix", "--prompts", "a", "-o", "b", "-m", "/nowhere"],
    ],
    ids=" ".join,
)
def test_failures_are_one_line(arguments, capsys):
    assert run(arguments) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ") and "/nowhere" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a", "--logprobs", "FILE"],
        ["chat", "--kv-dir", "FILE"],
        ["imatrix", "--prompts", "FILE", "-o", "b"],
        ["eval", "--reference", "FILE"],
        ["bench", "--csv", "FILE"],
        ["merge", "FILE", "b"],
    ],
    ids=" ".join,
)
def test_a_file_that_may_not_be_read_is_no_wrong_usage(arguments, tmp_path, monkeypatch, capsys):
    """Nor is one that is only written; where it has to be read the system refuses it by its name."""
    (tmp_path / "file").touch()
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    given = [str(tmp_path / "file") if word == "FILE" else word for word in arguments]
    assert run([*given, "-m", "/nowhere"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "traceback"),
    [
        (["--debug", "inspect", "/nowhere"], True),
        (["inspect", "--debug", "/nowhere"], True),
        (["inspect", "/nowhere", "--debug"], True),
        (["--debug", "inspect", "/nowhere", "--debug"], True),
        (["cache", "ls", "--kv-dir", "/nowhere", "--debug"], True),
        (["--debug", "cache", "ls", "--kv-dir", "/nowhere"], True),
        (["cache", "--debug", "ls", "--kv-dir", "/nowhere"], True),
        (["generate", "--debug", "-p", "a", "-m", "/nowhere"], True),
        (["inspect", "/nowhere"], False),
        (["inspect", "--", "--debug"], False),
        (["generate", "-m", "/nowhere", "-p", "--debug"], False),
        (["generate", "-m", "/nowhere", "--prompt=--debug"], False),
        (["generate", "-m", "/nowhere", "--", "--debug"], False),
        (["generate", "-m", "/nowhere", "a", "--stop", "--debug"], False),
        (["generate", "-m", "--debug", "a"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_debug_shows_the_traceback_where_it_is_an_option(arguments, traceback, capsys):
    assert run(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and (len(lines) > 1) == traceback
    assert (lines[0] == "Traceback (most recent call last):") == traceback


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        (SystemExit(), 0, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(1), 1, ""),
        (SystemExit(3), 3, ""),
        (SystemExit("the disk\nis gone"), 1, "error: the disk is gone\n"),
        (typer.Exit(1), 1, ""),
        (typer.Abort(), 130, ""),
        (KeyboardInterrupt(), 130, ""),
        (DataError("x: is empty"), 1, "error: x: is empty\n"),
        (OSError(28, "No space left on device", "x"), 1, "error: x: No space left on device\n"),
        (MemoryError("too much"), 1, "error: MemoryError: too much\n"),
        (ImportError("no such library"), 1, "error: ImportError: no such library\n"),
    ],
    ids=repr,
)
def test_exit_codes(end, code, message, monkeypatch, capsys):
    """Of whatever a command ends with."""

    def ended(*_):
        raise end

    monkeypatch.setattr("ds4mlx.cli.opening.find_model", ended)
    assert run(["generate", "a"]) == code
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temp", "-1"], "--temp: must be a number at least 0, not -1.0"),
        (["--top-p", "1.1"], "--top-p: must be a number from 0 to 1, not 1.1"),
        (["--top-p", "nan"], "--top-p: must be a number from 0 to 1, not nan"),
        (["--min-p", "2"], "--min-p: must be a number from 0 to 1, not 2.0"),
        (["--top-k", "-1"], "--top-k: must be a whole number at least 0, not -1"),
        (["--seed", "-1"], "--seed: must be a whole number from 0 to"),
        (["--stop", ""], "--stop: an empty text ends nothing"),
        (["-m", ""], "-m / --model"),
    ],
    ids=" ".join,
)
def test_wrong_values_are_named_by_their_option(options, message, capsys):
    for command in (["generate", "a"], ["chat"]):
        if command == ["generate", "a"] or options[0] != "--stop":
            assert run([*command, *options]) == 2
            err = capsys.readouterr().err
            assert message in err.replace("'", "") and "Value error" not in err
