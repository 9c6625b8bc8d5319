"""The 2- and 4-bit recipes: which tensor gets which format, and what is lost where."""

import json
import signal
import struct
import subprocess
import sys

import dying
import make_checkpoint
import mlx.core as mx
import numpy as np
import official
import pytest
from reference import run

from ds4mlx import DataError, load
from ds4mlx.cli.main import run as command
from ds4mlx.convert import convert, dequantize, quantize, verify
from ds4mlx.convert.comparison import BOUNDS
from ds4mlx.convert.official import OfficialSource
from ds4mlx.weights.directory import MANIFEST, ModelDirectory, canonical
from ds4mlx.weights.inventory import experts

LAYERS, EXPERTS = 8, 2
EIGHT = {
    "num_hidden_layers": LAYERS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 0, 0, 0, 0, 0, 0],
}
THREE = {**EIGHT, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0]}
ONE = {**EIGHT, "num_hidden_layers": 1, "compress_ratios": [4, 0]}
TWO_BITS = {"w1": "iq2_xxs", "w2": "q2_k", "w3": "iq2_xxs"}
FOUR_BITS = dict.fromkeys(TWO_BITS, "q4_k")


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight layers, so that q2-q4 has both kinds."""
    path = tmp_path_factory.mktemp("eight") / "official"
    make_checkpoint.make(str(path), 4, "tiny", EIGHT)
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    path = tmp_path_factory.mktemp("three") / "official"
    make_checkpoint.make(str(path), 5, "tiny", THREE)
    return path


@pytest.fixture(scope="module")
def converted(eight, three):
    """{recipe: (source, directory)}"""
    found = {recipe: (three, three.parent / recipe) for recipe in ("q2", "q4")}
    found["q2-q4"] = (eight, eight.parent / "q2-q4")
    for recipe, (source, path) in found.items():
        convert(source, path, recipe, progress=False)
    return found


def wanted(recipe: str, layer: str, last: int) -> dict[str, str]:
    """Formats of a layer's experts; MTP's are those of the last main layer."""
    number = last if layer.startswith("mtp") else int(layer.split(".")[1])
    late = recipe == "q4" or (recipe == "q2-q4" and number > last - 6)
    return FOUR_BITS if late else TWO_BITS


@pytest.mark.parametrize("recipe", ["q2", "q2-q4", "q4"])
def test_formats(converted, recipe):
    source, path = converted[recipe]
    before, directory = OfficialSource(source), ModelDirectory.open(path)
    last, seen = before.config.num_hidden_layers - 1, 0
    for entry in (e for entries in before.inventory.values() for e in entries):
        format = directory.format_of(entry)
        if entry.kind != "experts":
            assert format == before.exact(entry)
            continue
        layer, part = entry.name.removesuffix(".weight").split(".ffn.experts.")
        assert format == wanted(recipe, layer, last)[part]
        seen += 1
    assert seen == 3 * (last + 2)


@pytest.mark.parametrize("recipe", ["q2", "q2-q4", "q4"])
def test_only_the_experts_lose(converted, recipe):
    """Everything else is the source's, bit for bit; the experts lose what their format costs."""
    source, path = converted[recipe]
    limits = {"iq2_xxs": (0.2, 0.45), "q2_k": (0.15, 0.35), "q4_k": (0.03, 0.09)}
    for each in verify(path, source, progress=False):
        low, high = limits.get(each.format, (0, 0))
        assert low <= each.error <= high and not each.cause, each
    listed = json.loads((path / MANIFEST).read_text())["tensors"]
    rounded = {name for name, one in listed.items() if not one["lossless"]}
    assert rounded == {name for name in listed if ".ffn.experts." in name}


def decoded(path, entry) -> np.ndarray:
    """What the products of a directory multiply by."""
    module = load(path, mx.float32)[0]
    for part in entry.name.removesuffix(".weight").split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return np.array(module.decode())


def stack(source, name):
    """An entry of the source, and its values (experts, rows, columns)."""
    found = OfficialSource(source)
    entry = next(e for entries in found.inventory.values() for e in entries if e.name == name)
    rows = entry.shape[-2]
    return entry, np.stack([found.values(entry, e, 0, rows) for e in range(experts(entry))])


@pytest.mark.parametrize("part", ["w1", "w2", "w3"])
def test_the_manifest_says_what_is_lost(converted, part):
    """By the importance that was used: IQ2_XXS has the columns' energy, Q2_K none."""
    source, path = converted["q2"]
    name = f"layers.1.ffn.experts.{part}.weight"
    entry, values = stack(source, name)
    weight = (values**2).sum(1, keepdims=True) if part != "w2" else np.ones_like(values)
    gap = decoded(path, entry) - values
    want = ((weight * gap**2).sum() / (weight * values**2).sum()) ** 0.5
    said = json.loads((path / MANIFEST).read_text())["tensors"][name]["relative_errors"]
    assert said["weighted"] == pytest.approx(want, rel=1e-4)
    norms = [np.linalg.norm(gap), np.linalg.norm(values)]
    assert said["all"] == pytest.approx(norms[0] / norms[1], rel=1e-4)
    each = np.linalg.norm(gap, axis=(1, 2)) / np.linalg.norm(values, axis=(1, 2))
    assert said["matrices"] == pytest.approx(list(each), rel=1e-4)


def other_source(source, target, change):
    """A source in which one of two experts' w1 in layer 1 is another."""
    copy = official.copy(source, target)
    name = f"layers.1.ffn.experts.{EXPERTS - 1}.w1"
    official.change(copy, f"{name}.weight", lambda t: (t[0], change(t[1])))
    return copy


def unnoted(path, target):
    """The directory as an earlier version wrote it, without relative errors of matrices."""
    copy = official.copy(path, target)
    manifest = json.loads((copy / MANIFEST).read_text())
    for listed in manifest["tensors"].values():
        listed.pop("relative_errors", None)
    (copy / MANIFEST).write_bytes(canonical(manifest))
    return copy


def shuffled(raw):
    return np.random.default_rng(0).permutation(raw.reshape(-1)).reshape(raw.shape)


def some_changed(raw):
    """One code in 64 by a step: far less than what the format rounds away."""
    places = np.random.default_rng(0).random(raw.shape) < 1 / 64
    return np.where(places, raw ^ 1, raw)


@pytest.mark.parametrize("recipe", ["q2", "q4"])
@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize(
    ("change", "caught"), [(shuffled, (True, True)), (some_changed, (True, False))]
)
def test_a_rounded_matrix_must_come_from_its_source(
    converted, tmp_path, capsys, recipe, noted, change, caught
):
    """Against the noted error any change shows, against the format's bound an unrelated matrix."""
    source, path = converted[recipe]
    other = other_source(source, tmp_path / "other", change)
    path = path if noted else unnoted(path, tmp_path / "unnoted")
    code = command(["verify", str(path), "--against", str(other)])
    out, err = capsys.readouterr()
    assert code == (1 if caught[0 if noted else 1] else 0), (out, err)
    if code:
        assert "tensor layers.1.ffn.experts.w1.weight differs" in err
        assert f"of matrix {EXPERTS - 1} is" in err
    else:
        assert "by no more than their formats' rounding" in out.splitlines()[-1]


@pytest.mark.parametrize("kind", ["one in 64", "one in 16", "heavy tails", "normal", "equal"])
def test_right_quantisations_keep_within_the_bounds(kind):
    """Weights that suit the formats worst, and an unrelated matrix of the same size beyond."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 512)).astype(np.float32)
    if kind.startswith("one in"):
        values *= rng.random(values.shape) < 1 / int(kind.split()[-1])
    elif kind == "heavy tails":
        values = values**5
    elif kind == "equal":
        values = np.abs(values) * 0 + 1
    unrelated = rng.permutation(values.reshape(-1)).reshape(values.shape)
    for name, bound in BOUNDS.items():
        kept, most = dequantize(quantize(values, name)), bound * np.linalg.norm(values)
        assert np.linalg.norm(kept - values) <= most, name
        if kind != "equal":
            assert np.linalg.norm(kept - unrelated) > most, name


def test_the_quality_report(three, tmp_path, capsys):
    convert(three, tmp_path)
    assert "relative error" not in capsys.readouterr().err
    convert(three, tmp_path / "q4", "q4")
    lines = capsys.readouterr().err.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("relative error"))
    assert lines[head].split() == ["relative", "error", "gate", "down", "up"]
    rows = [line.split() for line in lines[head + 1 : head + 5]]
    assert [row[0] for row in rows] == ["layers.0", "layers.1", "layers.2", "mtp.0"]
    assert all(0.02 < float(number) < 0.1 for row in rows for number in row[1:])


def test_the_model_multiplies_by_the_decoded_values(converted, tmp_path):
    """Its logits are those of the official layout with the decoded experts in it."""
    source, path = converted["q2"]
    copy = official.copy(source, tmp_path / "official")
    for layer in range(3):
        for part in TWO_BITS:
            entry, _ = stack(source, f"layers.{layer}.ffn.experts.{part}.weight")
            for e, values in enumerate(decoded(path, entry)):
                name = entry.official(e)
                official.change(copy, name, lambda _, values=values: ("F32", values))
                official.change(copy, name.replace("weight", "scale"), lambda _: None)
    convert(copy, tmp_path / "dir", progress=False)
    ids = np.random.default_rng(0).integers(0, 288, 150)
    want, got = (run(load(p, mx.float32, "none")[0], ids) for p in (tmp_path / "dir", path))
    assert np.isfinite(got).all() and np.abs(got - want).max() <= 1e-4


# Importance.


def write_dat(path, layers: int, change=lambda name, values: values):
    """ds4's form: random importances, very different from column to column."""
    rng, records = np.random.default_rng(0), []
    for layer in range(layers):
        for part in ("gate", "up", "down"):
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            values = change(name, (rng.random(EXPERTS * 256) ** 6).astype("<f4"))
            if values is not None:
                head = struct.pack("<i", len(name)) + name.encode()
                records.append(head + struct.pack("<ii", 1, len(values)) + values.tobytes())
    path.write_bytes(struct.pack("<i", len(records)) + b"".join(records))
    return path


def weighted(path, source, name, importance) -> float:
    entry, values = stack(source, name)
    gap = decoded(path, entry) - values
    return float((importance * gap**2).sum() / (importance * values**2).sum()) ** 0.5


def test_importance_steers(converted, three, tmp_path):
    """Less of the weighted error than without it, and the manifest says by which file."""
    kept = {}

    def keep(name, values):
        kept[name] = values.reshape(EXPERTS, 1, 256)
        return values

    imatrix = write_dat(tmp_path / "importance.dat", 3, keep)
    convert(three, tmp_path / "q2", "q2", imatrix=imatrix, progress=False)
    for part, place in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        name = f"layers.2.ffn.experts.{part}.weight"
        importance = kept[f"blk.2.ffn_{place}_exps.weight"]
        with_it = weighted(tmp_path / "q2", three, name, importance)
        assert with_it < 0.9 * weighted(converted["q2"][1], three, name, importance)
        said = json.loads((tmp_path / "q2" / MANIFEST).read_text())
        noted = said["tensors"][name]["relative_errors"]
        assert noted["weighted"] == pytest.approx(with_it, rel=1e-4)
        assert said["importance"] == "importance.dat"


def test_importance_that_nothing_uses_is_noted(three, tmp_path, capsys):
    imatrix = write_dat(tmp_path / "importance.dat", 3, lambda _, values: values)
    convert(three, tmp_path / "out", imatrix=imatrix, dry_run=True)
    assert "note: recipe official rounds nothing by importance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n, v: None if n == "blk.1.ffn_up_exps.weight" else v,
            "no importance of blk.1.ffn_up",
        ),
        (lambda n, v: v[:-3] if "blk.2.ffn_down" in n else v, "blk.2.ffn_down_exps.weight has 509"),
        (lambda n, v: -v, "negative or not finite"),
    ],
)
def test_importance_that_does_not_fit(three, tmp_path, change, message):
    """Refused before anything is written."""
    imatrix = write_dat(tmp_path / "importance.dat", 3, change)
    with pytest.raises(DataError, match=rf"importance\.dat: .*{message}"):
        convert(three, tmp_path / "q2", "q2", imatrix=imatrix, progress=False)
    assert not (tmp_path / "q2").exists()


# The command line.


def test_dry_run_names_every_class(three, tmp_path, capsys):
    arguments = ["convert", str(three), str(tmp_path / "dir"), "--recipe", "q2", "--dry-run"]
    assert command(arguments) == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[1:-1]]
    found = {tuple(cell.strip() for cell in row if cell)[:4] for row in rows}
    assert {row[0] for row in found} >= {"routed experts", "attention", "embedding", "head", "mtp"}
    for row in found:
        assert (row[3] == "rounded") == (row[2] in ("iq2_xxs", "q2_k")), row
    assert ("routed experts", "I8", "iq2_xxs", "rounded") in found
    assert ("attention", "F8_E4M3", "mxfp8", "bit-exact") in found
    assert not (tmp_path / "dir").exists()


def test_rows_that_are_no_multiple_of_a_block(small_source, tmp_path, capsys):
    assert command(["convert", str(small_source), str(tmp_path / "dir"), "--recipe", "q4"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "tensor layers.0.ffn.experts.{expert}.w1.weight has rows of 128" in line
    assert "q4_k needs a multiple of 256" in line and ".safetensors" in line


def test_recipes_that_do_not_exist(three, tmp_path, capsys):
    assert command(["convert", str(three), str(tmp_path / "dir"), "--recipe", "q3"]) == 2
    assert "'q3' is not one of official, q2, q2-q4, q4" in capsys.readouterr().err


# Interruptions.


def die(source, target, last: int) -> subprocess.CompletedProcess:
    """Convert to q2 in a process that is killed at its `last`-th change to the disk."""
    arguments = [dying.__file__, source, target, last, int(signal.SIGKILL), "q2"]
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path, kills):
    """The same bytes as in one go, the losses in the manifest included."""
    source = tmp_path / "official"
    make_checkpoint.make(str(source), 6, "tiny", ONE)
    changes, rng = int(die(source, tmp_path / "whole", 0).stdout), np.random.default_rng(0)
    want = official.digests(tmp_path / "whole")
    for point in rng.integers(1, changes, kills):
        target = tmp_path / f"at{point}"
        assert die(source, target, point).returncode == -signal.SIGKILL
        convert(source, target, "q2", progress=False)
        assert official.digests(target) == want
