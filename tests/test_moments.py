"""Second moments: collected, kept in a file of their own, and used by a conversion."""

import json
import signal
import subprocess
import sys

import collecting
import dying
import make_checkpoint
import mlx.core as mx
import numpy as np
import official
import pytest
from collecting import collected
from moments import arrays_for, written
from safetensors import safe_open
from steering import InterruptAt

from ds4mlx import DataError
from ds4mlx.cli.main import run
from ds4mlx.config import ModelConfig
from ds4mlx.convert import convert, feedback, verify
from ds4mlx.convert.importance import Importance
from ds4mlx.convert.moments import ENOUGH
from ds4mlx.engine import machine
from ds4mlx.imatrix.recorder import MomentRecorder
from ds4mlx.imatrix.second_moments import MomentsFile
from ds4mlx.weights.directory import MANIFEST

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests. " * 2
SMALL = {
    "num_hidden_layers": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "num_hash_layers": 0,
    "compress_ratios": [0, 0, 0],
}


def tensors(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# Collecting


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def whole(small_dir, stored_model, prompts):
    """{file: bytes} of an undisturbed run with everything that there is."""
    folder = prompts.parent / "whole"
    folder.mkdir()
    collected(small_dir, prompts, folder / "out", stored_model, **asked(folder))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def asked(folder):
    return {"moments": folder / "second", "per_expert": True}


def test_sums_of_products():
    """Of all rows, and of each expert's, in float64."""
    rng = np.random.default_rng(0)
    x, experts = rng.standard_normal((50, 3, 16), np.float32), rng.integers(0, 4, (50, 3))
    recorder = MomentRecorder(4, 16)
    for part in (slice(0, 30), slice(30, 50)):
        kept = recorder.add(mx.array(x[part]), mx.array(experts[part]))
        assert np.array_equal(kept, x[part])
    rows = [x[experts == expert].astype(np.float64) for expert in range(4)]
    want = np.stack([each.T @ each for each in rows])
    np.testing.assert_allclose(recorder.take(), want, atol=1e-3)
    assert not recorder.take().any()
    whole = MomentRecorder(None, 16)
    mx.eval(whole.add(mx.array(x[:, 0]), mx.array(experts[:, :2])))
    np.testing.assert_allclose(whole.take()[0], x[:, 0].T @ x[:, 0], atol=1e-3)


def test_they_agree_with_the_importances(whole, prompts, stored_model):
    """Their diagonals are the importances' sums, which other tests compare with the reference."""
    found, config = tensors(prompts.parent / "whole" / "second"), stored_model.args
    stacks = Importance.read(prompts.parent / "whole" / "out").stacks
    for layer in range(config.num_hidden_layers):
        counts, w1 = found[f"layers.{layer}.counts"][:, None], found[f"layers.{layer}.w1"]
        gate, down = (stacks[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "down"))
        met = (gate * counts).sum(0) / config.num_experts_per_tok
        np.testing.assert_allclose(np.diag(w1), met, rtol=1e-4)
        w2 = found[f"layers.{layer}.w2"]
        met = counts[:, 0] > 0
        diagonal = np.diagonal(w2, axis1=1, axis2=2)
        np.testing.assert_allclose(diagonal[met], (down * counts)[met], rtol=1e-4, atol=1e-7)
        assert np.abs(w1 - w1.T).max() < 1e-3 * np.abs(w1).max()
        assert np.linalg.eigvalsh(w1.astype(np.float64))[0] > -1e-3 * np.abs(w1).max()


def test_each_experts_own_where_they_are_small(stored_model, tmp_path):
    """Unless told otherwise: of a small model, and not of Flash, where they are 185 GB."""

    def own(config, told=None):
        return MomentsFile.wanted(tmp_path / "second", tmp_path / "out", config, told).per_expert

    assert own(stored_model.args) and not own(ModelConfig())
    assert own(ModelConfig(), True) and not own(stored_model.args, False)


@pytest.mark.parametrize("tenth", [3, 6, 9])
def test_ctrl_c_then_the_same_bytes(whole, small_dir, stored_model, prompts, tmp_path, tenth):
    counted = InterruptAt(0)
    folder = tmp_path / "counted"
    folder.mkdir()
    collected(small_dir, prompts, folder / "out", stored_model, counted, **asked(folder))
    with pytest.raises(KeyboardInterrupt):
        at = InterruptAt(counted.count * tenth // 10)
        collected(small_dir, prompts, tmp_path / "out", stored_model, at, **asked(tmp_path))
    collected(small_dir, prompts, tmp_path / "out", stored_model, **asked(tmp_path))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == whole


@pytest.mark.parametrize("last", [5, -9, -5])
def test_killed_then_the_same_bytes(whole, small_dir, stored_model, prompts, tmp_path, last):
    """Between sums, before the moments are in place, and between them and the importances."""
    paths = small_dir, prompts, tmp_path / "out"
    changes = 4 * (len(TEXT) // (collecting.LENGTH - 1) + 1) + 4 + 4 + 2
    number = last if last > 0 else changes + 1 + last
    done = collecting.run_dying(*paths, number, signal.SIGKILL, [tmp_path / "second"])
    assert done.returncode == -signal.SIGKILL, done
    assert not (tmp_path / "out").exists()
    collected(*paths, stored_model, **asked(tmp_path))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == whole


def test_what_is_there_is_kept(whole, small_dir, stored_model, prompts, tmp_path):
    for name, raw in whole.items():
        (tmp_path / name).write_bytes(raw)
    again = small_dir, prompts, tmp_path / "out", stored_model
    assert collected(*again, **asked(tmp_path)) is None
    with pytest.raises(DataError, match="out: exists and is of another model, prompts or options"):
        collected(*again)
    (tmp_path / "second").write_bytes(b"something else")
    with pytest.raises(DataError, match="second: exists and is of another model"):
        collected(*again, **asked(tmp_path))
    (tmp_path / "second").unlink()
    assert collected(*again, **asked(tmp_path))
    assert (tmp_path / "second").read_bytes() == whole["second"]


def test_results_that_cannot_be(small_dir, stored_model, prompts, tmp_path, monkeypatch):
    again = small_dir, prompts, tmp_path / "out", stored_model
    with pytest.raises(DataError, match="need a file each"):
        collected(*again, moments=tmp_path / "out")
    with pytest.raises(DataError, match="gone: no such directory"):
        collected(*again, moments=tmp_path / "gone" / "second")
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(1 << 30, 1 << 20))
    with pytest.raises(DataError, match="second: summing second moments needs"):
        collected(*again, **asked(tmp_path))
    assert not list(tmp_path.iterdir())


# Converting


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "official"
    make_checkpoint.make(str(path), 6, "tiny", SMALL)
    return path


@pytest.fixture(scope="module")
def arrays(source):
    return arrays_for(source)


@pytest.fixture(scope="module")
def second(source, arrays):
    return written(source.parent / "second", arrays)


@pytest.fixture
def hasty(monkeypatch):
    """Without the descent, where only its result's presence counts."""
    monkeypatch.setattr(feedback, "SWEEPS", 0)


@pytest.fixture(scope="module")
def converted(source, second):
    target = source.parent / "fed"
    convert(source, target, "q2", moments=second, progress=False)
    return target


def errors(target):
    listed = json.loads((target / MANIFEST).read_text())["tensors"]
    return {
        name: listed[name]["relative_errors"]["weighted"]
        for name in listed
        if ".ffn.exp" in name and "relative_errors" in listed[name]
    }


def test_gate_and_up_lose_less(source, converted, tmp_path):
    """In their outputs; what has no moments is as without them."""
    manifest = json.loads((converted / MANIFEST).read_text())
    assert manifest["moments"] == "second" and manifest["importance"] is None
    assert verify(converted, source, progress=False)
    convert(source, tmp_path / "plain", "q2", progress=False)
    fed, plain = errors(converted), errors(tmp_path / "plain")
    for name in fed:
        part = name.split(".")[-2]
        if name.startswith("mtp") or part == "w2":
            assert fed[name] == plain[name]
        else:
            assert fed[name] < 0.25 < plain[name]


def test_killed_then_the_same_bytes_again(source, second, converted, tmp_path):
    target = tmp_path / "killed"
    arguments = [dying.__file__, source, target, 40, int(signal.SIGKILL), "q2", second]
    done = subprocess.run([sys.executable, *map(str, arguments)], check=False)
    assert done.returncode == -signal.SIGKILL and not (target / MANIFEST).exists()
    convert(source, target, "q2", moments=second, progress=False)
    assert official.digests(target) == official.digests(converted)


def test_down_where_tokens_are_enough(source, hasty, tmp_path, capsys):
    counts = [ENOUGH * 256, ENOUGH * 256 - 1]
    path = written(tmp_path / "each", arrays_for(source, True, counts))
    convert(source, tmp_path / "q2", "q2", moments=path)
    said = capsys.readouterr().err
    assert "gate and up: second moments of 5,000 tokens in every layer" in said
    assert "down: second moments for the 2 of 4 experts that met 4,096 tokens or more" in said
    assert "in the outputs" in said


def spoiled(arrays, path):
    """{what the refusal says: the file}"""
    raw = written(path / "sound", arrays).read_bytes()
    with_nan = {**arrays, "layers.1.w1": np.where(np.eye(256) > 0, np.nan, arrays["layers.1.w1"])}
    narrow = {**arrays, "layers.0.w1": arrays["layers.0.w1"][:128, :128].copy()}
    foreign = {**arrays, "layers.1.ffn_norm": arrays["layers.1.ffn_norm"] * 2}
    lacking = {name: each for name, each in arrays.items() if name != "layers.1.w1"}
    turned = bytearray(raw)
    turned[-5000] ^= 1
    empty = {**arrays, "layers.0.w1": 0 * arrays["layers.0.w1"]}
    negative = {**arrays, "layers.1.w1": -arrays["layers.1.w1"]}
    beyond = {**arrays, "layers.1.w1": arrays["layers.1.w1"] + 1e9 * np.eye(256, k=1)}
    uncounted = {**arrays, "layers.1.counts": -arrays["layers.1.counts"]}
    files = {
        "truncated": raw[:-100],
        "truncated inside its header": raw[:300],
        "not a safetensors file": b"GGUF" + raw,
        "does not match its checksum": bytes(turned),
        "is no file of second moments": raw.replace(b"ds4mlx moments 1", b"ds4mlx moments 9"),
        "its metadata are damaged": raw.replace(b'"tokens":"5000"', b'"tokens":"five"'),
    }
    for name, (changed, tokens) in {
        "layers.1.w1 has values that are not finite": (with_nan, 5000),
        r"layers.0.w1 is F32 \[128, 128\], and the model needs": (narrow, 5000),
        "these are moments of another model": (foreign, 5000),
        "tensor layers.1.w1 is missing": (lacking, 5000),
        "moments of 1,023 tokens are too few for 256 columns": (arrays, 1023),
        "layers.0.w1 is no matrix of second moments": (empty, 5000),
        "layers.1.w1 is no matrix of second moments": (negative, 5000),
        "w1 is no matrix of second moments": (beyond, 5000),
        "layers.1.counts has numbers of tokens below 0": (uncounted, 5000),
    }.items():
        floats = {key: np.asarray(each, np.float32) for key, each in changed.items()}
        files[name] = written(path / "one", floats, tokens).read_bytes()
    return files


def test_files_that_are_refused(source, arrays, tmp_path):
    """With one line that names the file, before anything is written."""
    bad = tmp_path / "bad"
    for cause, raw in spoiled(arrays, tmp_path).items():
        bad.write_bytes(raw)
        with pytest.raises(DataError, match=cause) as refused:
            convert(source, tmp_path / "q2", "q2", moments=bad, progress=False)
        assert str(refused.value).startswith(f"{bad}: ") and "\n" not in str(refused.value)
        assert not (tmp_path / "q2").exists()


def test_a_column_whose_squares_are_too_small_for_float32_is_no_fault(
    source, arrays, tmp_path, hasty
):
    """Products with other columns are not."""
    sums = arrays["layers.1.w1"].copy()
    sums[3], sums[:, 3] = 1e-24, 1e-24
    sums[3, 3] = 0
    small = written(tmp_path / "small", {**arrays, "layers.1.w1": sums})
    convert(source, tmp_path / "q2", "q2", moments=small, progress=False)
    assert (tmp_path / "q2" / MANIFEST).exists()


def test_any_bit_is_noticed(source, arrays, second, tmp_path, hasty):
    """Cuts, and single bits that change anywhere but in the unused parts of the header."""
    raw, rng = second.read_bytes(), np.random.default_rng(0)
    bad, refused = tmp_path / "bad", 0
    for _ in range(30):
        changed = bytearray(raw)
        changed[int(rng.integers(0, len(raw)))] ^= 1 << int(rng.integers(8))
        bad.write_bytes(changed)
        with pytest.raises(DataError) as error:
            convert(source, tmp_path / "q2", "q2", moments=bad, dry_run=True)
        refused += "\n" not in str(error.value)
    assert refused == 30


def test_moments_of_another_checkpoint_of_the_same_shapes(second, tmp_path):
    make_checkpoint.make(str(tmp_path / "other"), 8, "tiny", SMALL)
    with pytest.raises(DataError, match="second: these are moments of another model"):
        convert(tmp_path / "other", tmp_path / "q2", "q2", moments=second, progress=False)


# The command line


def test_commands(source, second, tmp_path, capsys):
    command = ["convert", str(source), str(tmp_path / "out"), "--moments", str(second)]
    assert run([*command, "--recipe", "bf16", "--dry-run"]) == 0
    assert "note: recipe bf16 rounds nothing by second moments" in capsys.readouterr().err
    assert run([*command, "--recipe", "q2", "--dry-run"]) == 0
    assert "down: no second moments, importances only" in capsys.readouterr().err
    assert run([*command[:-1], str(tmp_path / "gone"), "--recipe", "q2"]) == 1
    assert "gone: No such file or directory" in capsys.readouterr().err
    prompts = ["imatrix", "--prompts", "x", "-o", "y", "--per-expert"]
    assert run(prompts) == 2
    assert "is a part of --moments" in capsys.readouterr().err
