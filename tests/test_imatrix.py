"""Importances collected by running a model: their values, their file, and runs that are cut short."""

import fcntl
import json
import os
import re
import signal
import termios

import collecting
import make_checkpoint
import mlx.core as mx
import numpy as np
import processes
import pytest
import refmodel
from collecting import collected
from gguf import GGUFReader
from steering import InterruptAt

from ds4mlx import DataError, load
from ds4mlx.cli.main import run
from ds4mlx.convert import convert
from ds4mlx.convert.importance import Importance
from ds4mlx.custom_kernels.products.experts import SORT_FROM
from ds4mlx.imatrix.collect import Report
from ds4mlx.imatrix.recorder import recording
from ds4mlx.weights.directory import read_manifest

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests. " * 3


class Watched(refmodel.RefModel):
    """The float64 reference; sums the squares of what each routed expert's matrices are given."""

    def __init__(self, path):
        super().__init__(path)
        self.squares, self.counts = {}, {}

    def linear(self, x, name):
        if found := re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])", name):
            place = int(found[1]), found[3], int(found[2])
            self.squares[place] = self.squares.get(place, 0) + (x**2).sum(0)
            self.counts[place] = self.counts.get(place, 0) + len(x)
        return super().linear(x, name)


def arrays(path):
    """Every tensor of a GGUF file as its dimensions in the file and its values."""
    reader = GGUFReader(path)
    return {t.name: (tuple(t.shape.tolist()), np.array(t.data)) for t in reader.tensors}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A text of several sequences."""
    path = tmp_path_factory.mktemp("prompts") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def whole(small_dir, stored_model, prompts):
    """What an undisturbed run writes."""
    path = prompts.parent / "whole.gguf"
    collected(small_dir, prompts, path, stored_model)
    return path.read_bytes()


# Values


@pytest.mark.parametrize("step", [64, SORT_FROM // 2 - 1], ids=["sorted", "pairwise"])
def test_sums_are_those_of_the_reference(tiny_source, tiny_dir, exact_model, tmp_path, step):
    """In hash layers too; w1 and w3 are given the same, so one is recorded."""
    text = "".join(map(chr, np.random.default_rng(1).integers(32, 127, 90)))
    (tmp_path / "text").write_text(text)
    report = collected(
        tiny_dir, tmp_path / "text", tmp_path / "out", exact_model, length=64, step=step
    )
    reference = Watched(tiny_source)
    ids = load(tiny_dir)[1].encode(text)
    for start in range(0, len(ids), 63):
        reference.forward([0, *ids[start : start + 63]])
    assert report.tokens == len(ids) + -(-len(ids) // 63)
    found = arrays(tmp_path / "out")
    for layer in range(6):
        for part, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            stack = f"blk.{layer}.ffn_{name}_exps.weight"
            shape, sums = found[stack + ".in_sum2"]
            assert shape == (256, 4) and found[stack + ".counts"][0] == (1, 4)
            counts = found[stack + ".counts"][1].ravel()
            assert counts.sum() == report.tokens * 2
            for expert in range(4):
                place = layer, part, expert
                assert counts[expert] == reference.counts.get(place, 0)
                np.testing.assert_allclose(
                    sums[expert], reference.squares.get(place, 0), rtol=2e-3, atol=1e-4
                )


def test_gate_and_up_are_equal_and_down_is_not(whole, prompts):
    found = arrays(prompts.parent / "whole.gguf")
    assert len(found) == 3 * 3 * 2
    for layer in range(3):
        gate, up, down = (
            found[f"blk.{layer}.ffn_{name}_exps.weight.in_sum2"][1]
            for name in ("gate", "up", "down")
        )
        assert (gate == up).all() and not np.allclose(gate, down)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 7, 40])
def test_chunks_do_not_change_the_sums(whole, small_dir, stored_model, prompts, tmp_path, step):
    collected(small_dir, prompts, tmp_path / "out", stored_model, step=step)
    for name, (_, values) in arrays(prompts.parent / "whole.gguf").items():
        # a row that rounds the other way moves a few of them; a token left out, all by more
        np.testing.assert_allclose(arrays(tmp_path / "out")[name][1], values, rtol=2e-3)


def test_the_model_is_as_before(stored_model):
    """And computes the same while it is recorded."""
    ids = mx.array([list(range(3, 60))])
    names, want = [name for name, _ in stored_model.named_modules()], stored_model(ids)
    stacks = [stored_model.layers[0].ffn.experts[part] for part in ("w1", "w2", "w3")]
    with pytest.raises(KeyboardInterrupt), recording(stored_model):
        assert (stored_model(ids) == want).all()
        raise KeyboardInterrupt
    assert [name for name, _ in stored_model.named_modules()] == names
    assert all(
        stored_model.layers[0].ffn.experts[part] is stack
        for part, stack in zip(("w1", "w2", "w3"), stacks, strict=True)
    )


def test_activations_that_are_not_finite_are_refused(small_dir, prompts, tmp_path):
    model = load(small_dir, mx.float32)[0]
    model.layers[1].ffn_norm.weight = mx.full((128,), mx.inf)
    with pytest.raises(DataError, match="sequence 1: the inputs of layer 1's w1 are not finite"):
        collected(small_dir, prompts, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


# The file


def test_metadata(whole, prompts):
    reader = GGUFReader(prompts.parent / "whole.gguf")
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "imatrix"
    assert values["imatrix.datasets"] == ["text.txt"]
    assert values["imatrix.chunk_size"] == 48
    assert values["imatrix.chunk_count"] == 4


def test_the_converter_reads_it(whole, prompts):
    """Means, and an even importance where no token came."""
    path = prompts.parent / "whole.gguf"
    found = arrays(path)
    for name, stack in Importance.read(path).stacks.items():
        sums, counts = found[name + ".in_sum2"][1], found[name + ".counts"][1].reshape(-1, 1)
        assert stack.shape == (4, 128)
        np.testing.assert_allclose(stack, np.where(counts > 0, sums / np.maximum(counts, 1), 1))


def test_report():
    assert str(Report(2, 5000, 1000, 0)) == (
        "5,000 tokens in 2 sequences; 0 of 1,000 experts never reached (0.0%)"
    )
    first, second = str(Report(1, 4, 100, 90)).splitlines()
    assert "90 of 100" in first and second.startswith("warning: these get an even importance")


# Runs that are cut short


@pytest.fixture(scope="module")
def events(small_dir, stored_model, prompts, whole, tmp_path_factory):
    """Calls and returns of a whole run here, from the loading of the model on."""
    counted = InterruptAt(0)
    collected(small_dir, prompts, tmp_path_factory.mktemp("counted") / "out", stored_model, counted)
    return counted.count


@pytest.mark.parametrize(
    "point",
    [pytest.param(n, marks=pytest.mark.slow) if n in (1, 3, 5, 7) else n for n in range(14)],
)
def test_ctrl_c_anywhere_then_the_same_bytes(
    whole, small_dir, stored_model, prompts, tmp_path, events, point
):
    """Ten points at random, one in each tenth of the work, and four at its end."""
    number = events - 100 * (14 - point) if point >= 10 else events // 10 * point
    number += int(np.random.default_rng(point).integers(1, 90))
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        collected(small_dir, prompts, output, stored_model, InterruptAt(number))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "out.lock").exists()
    collected(small_dir, prompts, output, stored_model)
    assert output.read_bytes() == whole
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_ctrl_c_keeps_every_whole_sequence(
    whole, small_dir, stored_model, prompts, tmp_path, events
):
    first, rest = InterruptAt(events // 2), InterruptAt(0)
    with pytest.raises(KeyboardInterrupt):
        collected(small_dir, prompts, tmp_path / "out", stored_model, first)
    with np.load(tmp_path / "out.partial") as saved:
        assert saved["done"] >= 1
    collected(small_dir, prompts, tmp_path / "out", stored_model, rest)
    assert rest.count < 0.9 * events
    assert (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize("last", [1, 6, -6, -2])
def test_killed_anywhere_then_the_same_bytes(
    whole, small_dir, stored_model, prompts, tmp_path, last
):
    """Before any sum was saved, between, inside the last writing, and just after it."""
    sequences = GGUFReader(prompts.parent / "whole.gguf").fields["imatrix.chunk_count"].contents()
    changes = 4 * (sequences + 1) + 2  # saves and the result: sync, replace, open, sync; removals
    output = tmp_path / "out"
    number = last if last > 0 else changes + 1 + last
    done = collecting.run_dying(small_dir, prompts, output, number, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done
    assert output.exists() == (last == -2)
    (tmp_path / "out.new").write_bytes(b"GGUF, torn")
    found = collected(small_dir, prompts, output, stored_model)
    assert (found is None) == (last == -2)
    assert output.read_bytes() == whole
    assert not (tmp_path / "out.partial").exists()


def test_what_is_there_is_kept(whole, small_dir, stored_model, prompts, tmp_path):
    output = tmp_path / "out"
    output.write_bytes(whole)
    assert collected(small_dir, prompts, output, stored_model) is None
    for changed in ({"length": 32}, {"max_tokens": 60}):
        with pytest.raises(DataError, match="out: exists and is of another model, prompts or opt"):
            collected(small_dir, prompts, output, stored_model, **changed)
    assert output.read_bytes() == whole
    assert collected(small_dir, prompts, output, stored_model, max_tokens=60, overwrite=True)
    assert output.read_bytes() != whole


def test_an_unfinished_run_of_another_kind(
    whole, small_dir, stored_model, prompts, tmp_path, events
):
    def cut():
        with pytest.raises(KeyboardInterrupt):
            collected(small_dir, prompts, output, stored_model, InterruptAt(events // 2))
        assert partial.exists()

    output, partial = tmp_path / "out", tmp_path / "out.partial"
    cut()
    with pytest.raises(DataError, match=r"out\.partial: is an unfinished run with another model"):
        collected(small_dir, prompts, output, stored_model, length=32)
    collected(small_dir, prompts, output, stored_model, length=32, overwrite=True)
    assert output.read_bytes() != whole and not partial.exists()
    output.unlink()
    cut()
    partial.write_bytes(partial.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"out\.partial: damaged; use --overwrite"):
        collected(small_dir, prompts, output, stored_model)
    collected(small_dir, prompts, output, stored_model, overwrite=True)
    assert output.read_bytes() == whole


def test_two_at_once(small_dir, stored_model, prompts, tmp_path):
    with (tmp_path / "out.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another collection is writing here"):
            collected(small_dir, prompts, tmp_path / "out", stored_model)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")  # noqa: PTH110
def test_a_full_disk(small_dir, stored_model, prompts, tmp_path):
    (tmp_path / "out.new").symlink_to("/dev/full")
    with pytest.raises(DataError, match="No space left on device; the same command goes on"):
        collected(small_dir, prompts, tmp_path / "out", stored_model)
    assert not (tmp_path / "out").exists()


# The command line


ONE = {
    "num_hidden_layers": 1,
    "num_hash_layers": 0,
    "num_nextn_predict_layers": 0,
    "compress_ratios": [4],
    "n_routed_experts": 2,
}


def test_collect_then_convert(tmp_path, capsys):
    source, model = tmp_path / "official", tmp_path / "model"
    make_checkpoint.make(str(source), 2, "tiny", ONE)
    convert(source, model, progress=False)
    lines = [
        {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "thinking": "high"},
        {"prompt": TEXT},
        {"text": "def add(a, b):"},
    ]
    path, imatrix = tmp_path / "prompts.jsonl", tmp_path / "im.gguf"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    arguments = ["imatrix", "-m", model, "--prompts", path, "-o", imatrix, "--ctx", "100"]
    assert run([*map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "tokens in 3 sequences; 0 of 2 experts never reached" in err
    assert run([*map(str, arguments)]) == 0
    assert capsys.readouterr() == ("", f"{imatrix}: already complete\n")
    arguments = ["convert", source, tmp_path / "q2", "--recipe", "q2", "--imatrix", imatrix]
    assert run([*map(str, arguments)]) == 0
    assert read_manifest(tmp_path / "q2")["importance"] == "im.gguf"


def test_ctrl_c_on_the_command_line(small_dir, tmp_path):
    """Seen where it reads the prompts, a pipe without a writer."""
    os.mkfifo(tmp_path / "prompts")
    arguments = ["imatrix", "-m", small_dir, "--prompts", tmp_path / "prompts", "-o"]
    with (
        processes.start(*arguments, tmp_path / "out") as process,
        processes.writer(tmp_path / "prompts", process),
    ):
        out, err = processes.interrupt(process)
    assert (process.returncode, out) == (130, b"")
    assert err == b"interrupted; the same command goes on from here\n"


def test_progress_on_a_terminal(small_dir, prompts, tmp_path):
    arguments = ["imatrix", "-m", small_dir, "--prompts", prompts, "-o", tmp_path / "out"]
    with processes.Terminal(*arguments) as terminal:
        termios.tcsetwinsize(terminal.master, (24, 80))
        shown = terminal.until(r"tokens in .* sequences")
        assert terminal.end()[0] == 0
    assert "tok/s" in shown
