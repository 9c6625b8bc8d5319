"""`verify`: no byte of a directory can change unseen; `inspect`: sizes that add up."""

import json
import shutil

import mlx.core as mx
import numpy as np
import official
import pytest

from ds4mlx import DataError, load
from ds4mlx.cli.main import run
from ds4mlx.config import ModelConfig
from ds4mlx.convert import convert, inspect, verify
from ds4mlx.state.decode_state import state_bytes
from ds4mlx.weights.directory import canonical


@pytest.fixture
def spoiled(small_dir, tmp_path):
    """A converted directory to spoil."""
    return official.copy(small_dir, tmp_path / "converted")


def flip(file, place: int, bit: int = 0) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1 << bit
    file.write_bytes(raw)


def test_a_flipped_bit_anywhere_is_caught(small_source, spoiled):
    """Random places in every file, its first or last byte among them; the culprit is named."""
    rng = np.random.default_rng(2)
    for file in sorted(spoiled.iterdir()):
        size = file.stat().st_size
        for place in [int(rng.integers(2)) * (size - 1), *rng.integers(0, size, 2)]:
            bit = int(rng.integers(8))
            flip(file, place, bit)
            with pytest.raises(DataError) as caught:
                verify(spoiled, progress=False)
            assert file.name in str(caught.value), place
            flip(file, place, bit)
    verify(spoiled, small_source, progress=False)


def test_a_flipped_weight_names_its_tensor(spoiled):
    raw = (spoiled / "layers.1.experts.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    for name, place in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            at = 8 + size + place["data_offsets"][1] - 1
            flip(spoiled / "layers.1.experts.safetensors", at)
            with pytest.raises(DataError, match=rf"tensor {name} does not match its checksum"):
                verify(spoiled, progress=False)
            flip(spoiled / "layers.1.experts.safetensors", at)


@pytest.mark.parametrize("cut", [1, 100])
def test_a_file_of_another_length_does_not_even_load(spoiled, cut):
    for file in sorted(spoiled.glob("*.safetensors")):
        raw = file.read_bytes()
        for changed in (raw[:-cut], raw + bytes(cut)):
            file.write_bytes(changed)
            with pytest.raises(DataError, match=file.name):
                load(spoiled)
        file.write_bytes(raw)


def test_a_missing_file_is_named(spoiled):
    for file in sorted(spoiled.iterdir()):
        raw = file.read_bytes()
        file.unlink()
        with pytest.raises(DataError, match=file.name):
            verify(spoiled, progress=False)
        file.write_bytes(raw)


def manifest_without(path, *keys):
    """Remove an entry from the manifest and seal it again."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest[keys[0]][keys[1]]
    (path / "manifest.json").write_bytes(canonical(manifest))


def test_a_resealed_manifest_that_lacks_something(spoiled, small_dir):
    manifest_without(spoiled, "tensors", "layers.0.attn.wkv.weight")
    with pytest.raises(DataError, match=r"layers\.0\.attn\.wkv\.weight is missing"):
        load(spoiled)
    shutil.copy(small_dir / "manifest.json", spoiled)
    manifest_without(spoiled, "files", "layers.2.safetensors")
    with pytest.raises(DataError, match=r"layers\.2\.safetensors is missing"):
        load(spoiled)


def test_weights_of_another_model_are_seen_against_the_source(small_source, small_dir, tmp_path):
    """Right checksums, wrong values: only the comparison with the source tells."""
    other = official.copy(small_source, tmp_path / "other")
    name = "layers.1.ffn.experts.2.w2.scale"
    official.change(other, name, lambda t: (t[0], t[1] + 1))
    checked = {c.name: c for c in verify(small_dir, other, progress=False)}
    wrong = checked.pop("layers.1.ffn.experts.w2.weight")
    assert 0.1 < wrong.error < 1 and wrong.cause
    assert {(c.error, c.bound, c.cause) for c in checked.values()} == {(0.0, 0.0, None)}


# What a source may differ in by the smallest step: name, and the change of its raw array.
SMALLEST = [
    ("layers.0.attn.wkv.weight", lambda raw: raw ^ (np.arange(raw.size).reshape(raw.shape) == 77)),
    ("layers.1.ffn.experts.3.w1.weight", "sign of a zero"),
    ("embed.weight", lambda raw: raw ^ (np.arange(raw.size).reshape(raw.shape) == raw.size - 1)),
    ("layers.0.hc_ffn_base", lambda raw: np.nextafter(raw, np.float32(9))),
    ("layers.0.ffn.gate.tid2eid", lambda raw: raw[:, ::-1]),
]


@pytest.mark.parametrize(("name", "change"), SMALLEST)
def test_the_smallest_difference_fails_in_an_exact_format(
    small_source, small_dir, tmp_path, capsys, name, change
):
    def flip_zero(raw):
        raw = raw.copy()
        rows, columns = np.nonzero(raw & 7 == 0)
        raw[rows[0], columns[0]] ^= 8
        return raw

    other = official.copy(small_source, tmp_path / "other")
    change = flip_zero if isinstance(change, str) else change
    official.change(other, name, lambda t: (t[0], np.ascontiguousarray(change(t[1]))))
    assert run(["verify", str(small_dir), "--against", str(other)]) == 1
    out, err = capsys.readouterr()
    place = name.replace("experts.3", "experts").replace("_base", ".base")
    assert f"tensor {place} differs from {other}" in err and err.count("error: ") == 1
    assert "weights" in out


def test_a_source_of_another_shape_is_refused(small_dir, tiny_source):
    with pytest.raises(DataError, match="describes another model"):
        verify(small_dir, tiny_source, progress=False)


def test_command_line(small_source, small_dir, spoiled, capsys):
    assert run(["verify", str(small_dir), "--against", str(small_source)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + len({"mxfp4", "mxfp8", "bf16", "f32", "i32"})
    assert "12 weights  largest relative error 0\n" in out
    assert out.splitlines()[-1].endswith("equal their source bit for bit")
    assert run(["verify", str(small_dir), "--against", str(small_source), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "ok  mxfp4   layers.0.ffn.experts.w1.weight  relative error 0\n" in out
    assert run(["verify", str(small_dir), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == out.count("ok  ")
    flip(spoiled / "head.safetensors", -1)
    assert run(["verify", str(spoiled)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "head.weight" in err and err.count("\n") == 1


@pytest.mark.parametrize("tensors", [False, True])
def test_inspect_adds_up(small_source, small_dir, tensors):
    ours, theirs = inspect(small_dir, tensors), inspect(small_source, tensors)
    assert sum(ours.bytes_by_component.values()) == sum(
        array.nbytes
        for file in small_dir.glob("*.safetensors")
        for array in mx.load(str(file)).values()
    )
    stored = official.tensors(small_source).values()
    assert sum(theirs.bytes_by_component.values()) == sum(array.nbytes for _, array in stored)
    assert ours.state_bytes == theirs.state_bytes
    assert (ours.recipe, theirs.recipe) == ("official", None)
    assert bool(ours.tensors) == tensors
    assert json.loads(json.dumps(ours.as_dict()))["bytes_per_token"] == ours.bytes_per_token
    for component, size in ours.bytes_by_component.items():
        assert f"{size:,}" in str(ours) and component in str(ours)


def test_bytes_per_token_counts_what_a_token_reads(small_dir):
    """All but the MTP block, the experts not chosen, and the other rows of the embedding."""
    found, config = inspect(small_dir), inspect(small_dir).config
    sizes = dict(found.bytes_by_component)
    want = sum(sizes.values()) - sizes["mtp"]
    share = config["num_experts_per_tok"] / config["n_routed_experts"]
    want -= sizes["routed experts"] * (1 - share)
    want -= sizes["embedding"] * (1 - 1 / config["vocab_size"])
    assert found.bytes_per_token == round(want)


@pytest.mark.parametrize("length", [1, 130, 700])
def test_state_bytes_is_what_a_state_takes(small_model, length):
    cache = small_model.make_cache()
    mx.eval(small_model(mx.zeros((1, length), mx.int32), cache=cache))
    assert cache.nbytes == state_bytes(small_model.args, length, mx.float32)


def test_inspect_shows_flashs_own_sizes():
    """Rows and window of V4-Flash at a million tokens, in bfloat16: about 6.9 GB unpacked."""
    assert 3.6e9 < state_bytes(ModelConfig(), 1 << 20) < 4e9


def test_convert_then_inspect_f32(small_source, tmp_path):
    convert(small_source, tmp_path, "f32", progress=False)
    assert inspect(tmp_path).recipe == "f32"
