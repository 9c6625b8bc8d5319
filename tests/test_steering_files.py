"""Files of steering: what is written is read, other programs' files too, and nothing unsaid is guessed."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ds4mlx import DataError
from ds4mlx.research import Steering, Unstated, load_steering, save_steering

LAYERS, WIDTH = 5, 8
CONFIG = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=WIDTH)
FLASH = SimpleNamespace(num_hidden_layers=43, hidden_size=4096)
VALUES = st.floats(-1e3, 1e3, width=32).filter(lambda value: abs(value) > 1e-3)
DIRECTIONS = st.dictionaries(
    st.integers(0, LAYERS - 1), st.lists(VALUES, min_size=WIDTH, max_size=WIDTH), min_size=1
)
ONE = {1: np.arange(1, WIDTH + 1), 3: -np.ones(WIDTH)}


def same(one, other, ones=None):
    """Whether two steerings do the same."""
    said = [(s.operation, s.site, s.layers) for s in (one, other)]
    pairs = zip((ones or one.directions).values(), other.directions.values(), strict=True)
    return said[0] == said[1] and all((a == b).all() for a, b in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("steering")


# Ours


@settings(max_examples=12)
@given(DIRECTIONS, st.sampled_from(["add", "project"]), st.sampled_from(["ffn.in", "streams"]))
def test_our_own_file_says_it_all(folder, directions, operation, site):
    one, path = Steering(operation, site, directions, 0.1), folder / "own.safetensors"
    save_steering(path, one, CONFIG)
    for said in ({}, {"operation": operation}, {"site": site}):
        other = load_steering(path, CONFIG, **said)
        assert same(one, other) and other.scale == 0.1


def test_our_own_file_is_one_that_others_read(tmp_path):
    save_steering(tmp_path / "a.safetensors", Steering("add", "ffn.out", ONE), CONFIG)
    read = load_file(tmp_path / "a.safetensors")
    assert {name: each.tolist() for name, each in read.items()} == {
        f"direction.{n}": each.tolist() for n, each in ONE.items()
    }


OWN = {
    "kind": "ds4mlx steering 1",
    "operation": "add",
    "site": "ffn.out",
    "scale": "2",
    "layers": "1",
}


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"kind": "ds4mlx moments 1"}, "is no file of steering: its kind is 'ds4mlx moments 1'"),
        ({"operation": "scale"}, "the operation is add or project, not 'scale'"),
        ({"operation": None}, "does not say what .* operation=add or project"),
        ({"site": "logits"}, "not at 'logits'"),
        ({"site": None}, "does not say what .* site=SITE"),
        ({"scale": "much"}, "its scale is 'much'"),
        ({"scale": "nan"}, "the scale must be finite"),
        ({"layers": "1,2"}, "its tensors are not those of its layers, '1,2'"),
        ({"layers": None}, "its tensors are not those of its layers, None"),
    ],
)
def test_our_own_file_with_something_wrong(tmp_path, about, message):
    said = {key: value for key, value in (OWN | about).items() if value is not None}
    save_file({"direction.1": np.ones(WIDTH, np.float32)}, tmp_path / "a.safetensors", said)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}/a.safetensors: .*{message}"):
        load_steering(tmp_path / "a.safetensors", CONFIG)


# ds4's


@settings(max_examples=12)
@given(st.lists(st.lists(VALUES, min_size=WIDTH, max_size=WIDTH), min_size=LAYERS, max_size=LAYERS))
def test_a_file_of_ds4_is_read_as_it_is(folder, rows):
    rows = np.array(rows, np.float32)
    rows[2] = 0
    (folder / "raw.f32").write_bytes(rows.tobytes())
    read = load_steering(folder / "raw.f32", CONFIG, "project", "attn.out")
    assert read.layers == [0, 1, 3, 4] and (read.operation, read.site) == ("project", "attn.out")
    assert all((read.directions[n] == rows[n]).all() for n in read.layers)
    save_steering(folder / "again.f32", read, CONFIG)
    again = np.fromfile(folder / "again.f32", "<f4").reshape(LAYERS, WIDTH).astype(np.float64)
    lengths = np.linalg.norm(again, axis=1)
    assert np.abs(lengths - [1, 1, 0, 1, 1]).max() < 1e-6
    assert np.abs(again * np.linalg.norm(rows, axis=1, keepdims=True) - rows).max() < 1e-3


def test_a_file_of_ds4_has_the_size_of_the_model(tmp_path):
    rows = np.random.default_rng(2).normal(size=(43, 4096)).astype("<f4")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    (tmp_path / "flash.f32").write_bytes(rows.tobytes())
    read = load_steering(tmp_path / "flash.f32", FLASH, "project", "ffn.out")
    assert read.layers == [*range(43)]
    save_steering(tmp_path / "again.f32", read, FLASH)
    assert (tmp_path / "again.f32").stat().st_size == 43 * 4096 * 4
    with pytest.raises(DataError, match=r"704,512 bytes are .* not 5 x 8 float32 \(160 bytes\)"):
        load_steering(tmp_path / "flash.f32", CONFIG, "project", "ffn.out")


def test_what_a_file_of_ds4_does_is_asked(tmp_path):
    (tmp_path / "a.f32").write_bytes(np.ones((LAYERS, WIDTH), "<f4").tobytes())
    for said, missing in (
        ({}, ["operation", "site"]),
        ({"operation": "project"}, ["site"]),
        ({"site": "ffn.out"}, ["operation"]),
    ):
        with pytest.raises(Unstated) as raised:
            load_steering(tmp_path / "a.f32", CONFIG, **said)
        assert raised.value.missing == missing
        assert all(f"{name}=" in str(raised.value) for name in missing)


@pytest.mark.parametrize(("operation", "site"), [("add", "ffn.out"), ("project", "streams")])
def test_what_ds4_would_misread_is_not_written(tmp_path, operation, site):
    with pytest.raises(DataError, match=f"cannot be one to {operation} at {site}"):
        save_steering(tmp_path / "a.f32", Steering(operation, site, ONE), CONFIG)
    with pytest.raises(DataError, match=r"written as \.safetensors, \.f32, \.gguf"):
        save_steering(tmp_path / "a.bin", Steering(operation, site, ONE), CONFIG)
    assert [*tmp_path.iterdir()] == []


# llama.cpp's


def control_vector(path, tensors, **keys):
    """A file as llama.cpp's generator and others write it."""
    writer = GGUFWriter(path, keys.pop("architecture", "controlvector"))
    writer.add_string("controlvector.model_hint", "deepseek4")
    writer.add_uint32("controlvector.layer_count", LAYERS - 1)
    for key, value in keys.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key.replace("__", "."), value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FLAT = {f"direction.{n}": each.astype(np.float32) for n, each in ONE.items()}


def test_a_control_vector_is_read_where_llama_cpp_applies_it(tmp_path):
    path = control_vector(tmp_path / "a.gguf", FLAT)
    with pytest.raises(Unstated):
        load_steering(path, CONFIG)
    read = load_steering(path, CONFIG, "add", "streams")
    assert same(Steering("add", "streams", ONE), read)


@settings(max_examples=12)
@given(DIRECTIONS.filter(lambda made: 0 not in made), st.sampled_from(["add", "project"]))
def test_a_control_vector_of_ours_says_what_it_is_for(folder, directions, operation):
    one, path = Steering(operation, "streams", directions, 0.5), folder / "ours.gguf"
    save_steering(path, one, CONFIG)
    read = load_steering(path, CONFIG)
    assert same(one, read, one.unit() if operation == "project" else None) and read.scale == 0.5
    reader = GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert {t.name: t.data.shape for t in reader.tensors} == {
        f"direction.{n}": (WIDTH,) for n in directions
    }
    with pytest.raises(DataError, match=f"its operation is {operation}, as it says itself"):
        load_steering(path, CONFIG, "add" if operation == "project" else "project")


def test_what_a_control_vector_has_no_words_for(tmp_path):
    for site in ("ffn.out", "attn.out"):
        save_steering(tmp_path / "a.gguf", Steering("project", site, ONE), CONFIG)
        assert load_steering(tmp_path / "a.gguf", CONFIG).site == site
    first = Steering("add", "streams", {0: np.ones(WIDTH)})
    with pytest.raises(DataError, match="none for layer 0"):
        save_steering(tmp_path / "b.gguf", first, CONFIG)
    with pytest.raises(DataError, match=r"not for ffn\.in"):
        save_steering(tmp_path / "b.gguf", replace(first, site="ffn.in"), CONFIG)
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        (FLAT, {"architecture": "llama"}, "holds 'llama', not a control vector"),
        (FLAT, {"glp__mode": "rotate"}, "glp.mode, 'rotate', is not known"),
        (FLAT, {"glp__hook_point": "embeddings"}, "glp.hook_point, 'embeddings', is not known"),
        (FLAT, {"glp__spec_version": 2}, "glp.spec_version is 2, and only 1"),
        (FLAT, {"glp__rank": 3}, "glp.rank is 3, and only 1"),
        (FLAT, {"glp__alpha_default": float("nan")}, "alpha_default is nan"),
        ({"direction.0": np.ones(WIDTH, np.float32)}, {}, "'direction.0' is none of direction.1"),
        ({"direction.1.1": np.ones(WIDTH, np.float32)}, {}, "is none of direction.1"),
        ({"direction.9": np.ones(WIDTH, np.float32)}, {}, "layers 0 to 4, no 9"),
        ({"direction.1": np.ones(WIDTH, np.float16)}, {}, "has type F16, expected F32"),
        ({"direction.1": np.ones(4, np.float32)}, {}, "4 channels are not of a model of 8"),
        ({"direction.1": np.ones((2, WIDTH), np.float32)}, {}, r"layer 1 is \(2, 8\)"),
        ({"direction.1": np.full(WIDTH, np.nan, np.float32)}, {}, "not finite"),
        ({"direction.1": np.zeros(WIDTH, np.float32)}, {}, "no direction but 0"),
    ],
)
def test_a_control_vector_with_something_wrong(tmp_path, tensors, keys, message):
    path = control_vector(tmp_path / "a.gguf", tensors, **keys)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*{message}"):
        load_steering(path, CONFIG, "add", "streams")


# All of them


@given(st.data())
def test_a_file_that_is_cut_or_damaged_is_refused_or_read(folder, data):
    """In one line that names it; whatever is read is finite and fits the model."""
    suffix = data.draw(st.sampled_from([".safetensors", ".gguf", ".f32"]))
    path = folder / f"whole{suffix}"
    if not path.exists():
        save_steering(path, Steering("project", "ffn.out", ONE), CONFIG)
    raw, bad = bytearray(path.read_bytes()), folder / f"bad{suffix}"
    if cut := data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    bad.write_bytes(raw)
    try:
        read = load_steering(bad, CONFIG, "project", "ffn.out")
    except DataError as error:
        assert str(error).startswith(f"{bad}: ") and "\n" not in str(error)
        return
    assert not cut
    assert all(np.isfinite(each).all() and len(each) == WIDTH for each in read.directions.values())


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: No such file"):
        load_steering(tmp_path / "nowhere", CONFIG)
    with pytest.raises(DataError, match="Is a directory"):
        load_steering(tmp_path, CONFIG)
    (tmp_path / "a").write_text(json.dumps({"directions": []}))
    with pytest.raises(DataError, match="no safetensors file, no GGUF file"):
        load_steering(tmp_path / "a", CONFIG, "add", "streams")
