"""Steering from the command line: what is written, what is asked for, and what is said."""

import io

import numpy as np
import pytest

from ds4mlx import generate
from ds4mlx.chat import encode_messages
from ds4mlx.cli.main import run
from ds4mlx.research import Steering, save_steering

PROMPT = "def add(a, b):"
WRITTEN = encode_messages([{"role": "user", "content": PROMPT}], thinking="none")


@pytest.fixture(scope="module")
def how():
    rng = np.random.default_rng(3)
    return Steering("project", "ffn.out", {n: rng.normal(size=128) for n in range(4)}, -3.0)


@pytest.fixture
def files(talker, how, tmp_path):
    for name in ("own.safetensors", "raw.f32"):
        save_steering(tmp_path / name, how, talker[0].args)
    return tmp_path


@pytest.fixture
def ask(talker_dir, capsys):
    """Runs `generate` in this process, greedy and short: exit code, stdout, stderr."""

    def ask(*options, prompt=PROMPT):
        fixed = ["--temp", "0", "--max-tokens", "6", "--think", "none", "-m", str(talker_dir)]
        code = run(["generate", prompt, *fixed, *map(str, options)])
        return code, *capsys.readouterr()

    return ask


def text(talker, how, **options):
    with talker[0].steer(how, **options):
        return generate(*talker, WRITTEN, 6) + "\n"


def test_a_file_that_says_what_it_does(ask, talker, how, files):
    plain, own = generate(*talker, WRITTEN, 6) + "\n", files / "own.safetensors"
    code, out, err = ask("--steer", own)
    assert (code, out) == (0, text(talker, how)) and out != plain
    assert "steering: project at ffn.out, layers 0 to 3, scale -3\n" in err
    assert ask("--steer", own, "--steer-scale", "0")[1] == plain
    code, out, err = ask("--steer", own, "--steer-scale", "-9", "--steer-layers", "1-2")
    assert (code, out) == (0, text(talker, how, scale=-9, layers=[1, 2]))
    assert "steering: project at ffn.out, layers 1 to 2, scale -9\n" in err


def test_a_file_that_does_not_say(ask, talker, how, files):
    raw = files / "raw.f32"
    for given, missing in (
        ([], ["--steer-operation add or project", "--steer-site SITE"]),
        (["--steer-operation", "project"], ["--steer-site SITE"]),
    ):
        code, out, err = ask("--steer", raw, *given)
        assert (code, out) == (2, "")
        assert "does not say what is to be done" in err and all(each in err for each in missing)
    said = ["--steer-operation", "project", "--steer-site", "ffn.out", "--steer-scale", "-3"]
    code, out, _ = ask("--steer", raw, *said)
    assert (code, out) == (0, text(talker, how))


def test_chat_is_steered(talker, talker_dir, how, files, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode())))
    options = ["--temp", "0", "--max-tokens", "6", "--think", "none", "-m", str(talker_dir)]
    assert run(["chat", *options, "--steer", str(files / "own.safetensors")]) == 0
    assert capsys.readouterr().out == text(talker, how)


@pytest.mark.slow
def test_a_store_is_shared_by_steered_and_unsteered_runs(ask, files):
    """The second run of each takes up what the first has saved, and writes the same."""
    options, runs = ["--raw", "--kv-dir", files / "kv"], []
    own = ["--steer", files / "own.safetensors"]
    for more in ([], own, [], own, [*own, "--steer-scale", "1"]):
        code, out, err = ask(*options, *more, prompt=PROMPT * 95)
        assert code == 0
        runs.append((out, " kept" in err))
    assert runs[0][0] == runs[2][0] != runs[1][0] == runs[3][0]
    assert [kept for _, kept in runs] == [False, False, True, True, False]


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steer-scale", "2"], "--steer-scale needs --steer FILE"),
        (["--steer-layers", "1-2"], "--steer-layers needs --steer FILE"),
        (["--steer-operation", "add"], "--steer-operation needs --steer FILE"),
        (["--steer", "x", "--steer-layers", "2-1"], "'2-1' is not A-B"),
        (["--steer", "x", "--steer-layers", "-1"], "'-1' is not A-B"),
        (["--steer", "x", "--steer-site", "logits"], "not at 'logits'"),
        (["--steer", "x", "--steer-operation", "scale"], "'scale' is not one of"),
    ],
)
def test_wrong_usage_is_said_before_a_model_is_loaded(command, options, words, capsys):
    arguments = ["x"] if command == "generate" else []
    assert run([command, *arguments, "-m", "nowhere", *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--steer-scale", "nan"], 2, "the scale must be finite"),
        (["--steer-layers", "4-9"], 2, "not for layer 4, 5, 6, 7, 8, 9"),
        (["--steer-operation", "add"], 1, "own.safetensors: its operation is project"),
    ],
)
def test_what_does_not_fit_the_file(ask, files, options, code, words):
    got, out, err = ask("--steer", files / "own.safetensors", *options)
    assert (got, out) == (code, "") and words in err
    if code == 1:
        assert err.count("\n") == 1 and "error: " in err
