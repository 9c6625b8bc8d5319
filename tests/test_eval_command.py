"""ds4mlx eval from the command line: what each option measures, both outputs, and failures."""

import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from reference import DATA, log_softmax, run

from ds4mlx.cli.main import run as command
from ds4mlx.convert import convert
from ds4mlx.evaluation import suite
from ds4mlx.evaluation.recall_accuracy import Plan

TEXT = 'def add(a, b):\n    """The sum."""\n    return a + b\n' * 9


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


@pytest.fixture
def evaluate(talker_dir, capsys):
    """Runs the command in this process: exit code, stdout, stderr."""

    def evaluate(*options, model=talker_dir):
        code = command(["eval", "-m", str(model), *map(str, options)])
        return code, *capsys.readouterr()

    return evaluate


def test_perplexity_of_a_text(evaluate, talker, text):
    model, tokenizer = talker
    ids = [tokenizer.bos_token_id, *tokenizer.encode(TEXT)]
    logits = log_softmax(run(model, ids))[:-1]
    want = math.exp(-logits[np.arange(len(ids) - 1), ids[1:]].mean())
    code, out, _ = evaluate("--text", text, "--json")
    found = json.loads(out)
    assert code == 0 and found["perplexity"]["perplexity"] == pytest.approx(want, rel=1e-4)
    assert found["perplexity"]["tokens"] == len(ids) - 1
    assert found["recipe"] == "official" and found["recall"] is None and not found["agreement"]
    code, out, _ = evaluate("--text", text)
    assert code == 0 and "tokens before" in out
    shown = float(out.partition("perplexity ")[2].split()[0])
    assert shown == pytest.approx(want, rel=1e-4)


def test_a_text_longer_than_the_context(evaluate, text):
    code, out, _ = evaluate("--text", text, "--ctx", 65, "--json")
    found = json.loads(out)["perplexity"]
    assert code == 0 and found["same_text"] and found["context"] == 65
    assert [d["first"] for d in found["depths"]] == [0, 16, 32, 48]


def test_against_a_directory_and_against_saved_logits(evaluate, talker_dir, text, tmp_path):
    saved = tmp_path / "saved.safetensors"
    code, out, _ = evaluate("--save-logits", saved, "--text", text, "--rounding", "none")
    assert code == 0 and "perplexity" not in out
    tokens = mx.load(str(saved))["tokens"]
    code, out, _ = evaluate("--reference", saved, "--json")
    (found,) = json.loads(out)["agreement"]
    assert code == 0 and found["kl"]["count"] == tokens.size and 0 < found["kl"]["value"] < 1
    code, out, _ = evaluate("--reference", saved, "--rounding", "none", "--json")
    (found,) = json.loads(out)["agreement"]
    assert found["kl"]["value"] < 1e-7 and found["top1"]["value"] == 1
    code, out, _ = evaluate("--reference", talker_dir, "--text", text)
    assert code == 0 and "KL divergence, nats" in out and "100.0%" in out


def test_logits_of_another_program(evaluate, tmp_path):
    """llama.cpp's, of a GGUF file; it does not round KV rows."""
    model, gguf = tmp_path / "model", DATA / "gguf" / "ds4-q2.gguf"
    assert command(["convert", str(gguf), str(model)]) == 0
    logits = DATA / "gguf" / "ds4-q2.logits.safetensors"
    code, out, _ = evaluate("--reference", logits, "--rounding", "none", "--json", model=model)
    (found,) = json.loads(out.partition("{")[1] + out.partition("{")[2])["agreement"]
    assert code == 0 and found["kl"]["count"] == 400
    assert found["kl"]["value"] < 1e-3 and found["top1"]["value"] > 0.99


def test_everything_without_options(evaluate, monkeypatch):
    """With small samples: three parts, in both outputs."""
    monkeypatch.setattr(suite, "PLANS", (Plan(1, 250, 2, 1),))
    monkeypatch.setattr(suite, "CASES", 0)
    code, out, err = evaluate("--ctx", 100, "--scale", "0.1")
    assert code == 0 and err == ""
    for line in ("perplexity", "recall, tokens back", "no CSA rows", "measured in: perplexity"):
        assert line in out
    code, out, _ = evaluate("--ctx", 100, "--part", "recall", "--json")
    found = json.loads(out)
    assert code == 0 and found["perplexity"] is None and len(found["recall"]["results"]) == 3


def test_vectors(evaluate):
    file = DATA / "vectors" / "official" / "short_reasoning_plain.official.json"
    code, out, _ = evaluate("--vectors", file)
    assert code == 0 and "short_reasoning_plain" in out and "0 of 1" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "{tmp}/none.txt"], "none.txt: No such file"),
        (["--text", "{tmp}/empty.txt"], "empty.txt: holds no prompts"),
        (["--text", "{tmp}/latin.txt"], "latin.txt:1: not UTF-8"),
        (["--reference", "{tmp}/none"], "none: no such directory"),
        (["--reference", "{tmp}/latin.txt"], "latin.txt: not a safetensors file"),
        (["--vectors", "{tmp}/latin.txt"], "latin.txt: not UTF-8"),
        (["--vectors", "{tmp}/empty.txt"], "empty.txt: holds no cases"),
        (["--ctx", "1000000", "--text", "{tmp}/text.txt"], "the context must have 8 to 65536"),
        (["--save-logits", "{tmp}/no/file", "--text", "{tmp}/text.txt"], "no/file"),
        (["-m", "{tmp}"], "no manifest.json"),
    ],
)
def test_failures_are_one_line(evaluate, tmp_path, options, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff\xff\xff\xff\xff\xff\xff")
    code, out, err = evaluate(*(option.format(tmp=tmp_path) for option in options))
    assert code == 1 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("options", [["--ctx", 1], ["--scale", 0], ["--part", "x"], ["--dtype", 1]])
def test_wrong_usage(evaluate, options):
    assert evaluate(*options)[0] == 2


def test_a_model_without_tokenizer(evaluate, small_source, small_model, tmp_path):
    shutil.copytree(small_source, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").unlink()
    convert(tmp_path / "source", tmp_path / "model", progress=False)
    saved, ids = tmp_path / "saved.safetensors", np.arange(50, dtype=np.int32)
    logits = mx.array(run(small_model, ids))
    mx.save_safetensors(str(saved), {"tokens": mx.array(ids), "logits": logits})
    code, out, _ = evaluate("--reference", saved, "--json", model=tmp_path / "model")
    assert code == 0 and json.loads(out)["agreement"][0]["kl"]["value"] < 1e-5
    code, _, err = evaluate(model=tmp_path / "model")
    assert code == 1 and "tokenizer.json: no such file, so text cannot be encoded" in err
