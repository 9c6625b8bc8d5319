"""Conversion: what is written holds the source's values, and says so; recipes, sources, layout."""

import json

import mlx.core as mx
import numpy as np
import official
import pytest
import v4format

from ds4mlx import DataError, load
from ds4mlx.convert import convert, verify
from ds4mlx.weights.directory import ModelDirectory
from ds4mlx.weights.inventory import inventory

OFFICIAL_TYPES = {"mxfp8": "F8_E4M3", "mxfp4": "I8", "bf16": "BF16", "f32": "F32", "i32": "I64"}


def source_values(path) -> dict[str, np.ndarray]:
    """Every weight decoded by the oracle, by official name."""
    return v4format.load_checkpoint(str(path))[1]


def stored_values(directory: ModelDirectory) -> dict[str, np.ndarray]:
    """Every weight as MLX reads it, by official name; an expert is a weight by itself."""
    found = {}
    for file, entries in directory.inventory.items():
        arrays = mx.load(str(directory.path / file))
        for entry in entries:
            values = decoded(arrays, entry, directory.format_of(entry))
            stack = values if entry.kind == "experts" else values[None]
            found |= {entry.official(e): matrix for e, matrix in enumerate(stack)}
    return found


def decoded(arrays, entry, format) -> np.ndarray:
    weight = arrays[entry.name]
    if format.startswith("mxfp"):
        bits, scales = int(format[-1]), arrays[f"{entry.module}.scales"]
        options = {"group_size": 32, "bits": bits, "mode": format, "dtype": mx.float32}
        weight = mx.dequantize(weight, scales, **options)
    return np.array(weight.astype(mx.float32) if weight.dtype == mx.bfloat16 else weight)


@pytest.fixture(scope="module", params=["official", "bf16", "f32"])
def converted(request, tiny_source, tmp_path_factory):
    """The tiny checkpoint under each recipe."""
    path = tmp_path_factory.mktemp(request.param)
    convert(tiny_source, path, request.param, progress=False)
    return request.param, ModelDirectory.open(path)


def test_mlx_reads_the_official_values(converted, tiny_source):
    _, directory = converted
    want, got = source_values(tiny_source), stored_values(directory)
    assert want.keys() == got.keys()
    for name, values in want.items():
        assert np.array_equal(got[name], values), name


def test_every_tensor_has_the_recipes_format(converted):
    recipe, directory = converted
    for entries in directory.inventory.values():
        for entry in entries:
            format = directory.format_of(entry)
            if recipe == "official":
                official_type = {"matrix": "mxfp8", "experts": "mxfp4", "plain": "bf16"}
                assert format == official_type.get(entry.kind, format)
            elif entry.kind in ("matrix", "experts", "plain"):
                assert format == recipe
            assert entry.kind != "exact" or format == "f32"


def test_verify_finds_no_error(converted, tiny_source):
    _, directory = converted
    found = verify(directory.path, tiny_source, progress=False)
    assert {checked.error for checked in found} == {0.0}
    assert len(found) == sum(map(len, directory.inventory.values()))


def test_the_manifest_tells_where_a_tensor_comes_from(converted, tiny_source):
    _, directory = converted
    for name, listed in directory.manifest["tensors"].items():
        tensor = listed["source"]["tensor"].replace("{expert}", "0")
        assert official.shard(tiny_source, tensor).name in listed["source"]["files"], name
        assert listed["lossless"] is True


def test_the_same_source_gives_the_same_bytes(small_source, tmp_path):
    convert(small_source, tmp_path / "a", progress=False)
    convert(small_source, tmp_path / "b", max_memory=1, progress=False)
    assert official.digests(tmp_path / "a") == official.digests(tmp_path / "b")


def test_experts_lie_one_after_the_other(small_source, small_dir):
    """One expert of one projection is one range of the file, in the source's own bytes."""
    raw = (small_dir / "layers.1.experts.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    places = json.loads(raw[8 : 8 + header])
    source = official.tensors(small_source)
    for part in ("w1", "w2", "w3"):
        for plane, suffix in (("weight", "weight"), ("scales", "scale")):
            start, end = places[f"layers.1.ffn.experts.{part}.{plane}"]["data_offsets"]
            size = (end - start) // 4
            for expert in range(4):
                first = 8 + header + start + expert * size
                name = f"layers.1.ffn.experts.{expert}.{part}.{suffix}"
                assert raw[first : first + size] == source[name][1].tobytes()


def test_a_single_unsharded_file(small_source, small_dir, tmp_path):
    source = official.copy(small_source, tmp_path / "source")
    official.unshard(source)
    convert(source, tmp_path / "out", progress=False)
    weights = {n: d for n, d in official.digests(small_dir).items() if n.endswith(".safetensors")}
    assert weights.items() <= official.digests(tmp_path / "out").items()


def test_expert_dtype_need_not_be_told(small_source, tmp_path):
    source = official.copy(small_source, tmp_path / "source")
    official.edit_config(source, expert_dtype=None)
    convert(source, tmp_path / "out", progress=False)
    assert ModelDirectory.open(tmp_path / "out").formats["layers.0.ffn.experts.w1"] == "mxfp4"


@pytest.mark.parametrize("recipe", ["official", "bf16", "f32"])
def test_experts_in_fp8(small_source, tmp_path, recipe):
    """The type comes from the tensors, not from the configuration."""
    source = official.copy(small_source, tmp_path / "source")
    for name in [n for n in official.tensors(source) if n.endswith(".weight") and "experts." in n]:
        if "shared" not in name:
            requantise_fp8(source, name)
    convert(source, tmp_path / "out", recipe, progress=False)
    assert {c.error for c in verify(tmp_path / "out", source, progress=False)} == {0.0}
    model, _ = load(tmp_path / "out", dtype=mx.float32)
    assert model.layers[0].ffn.experts.w1.format == {"official": "mxfp8"}.get(recipe, recipe)
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


def requantise_fp8(source, name):
    """Turn an FP4 weight into an FP8 one."""
    scale = name.replace(".weight", ".scale")
    raw = official.tensors(source)
    values = v4format.dequantise_fp4(raw[name][1], raw[scale][1])
    codes, scales = v4format.quantise_fp8(values)
    official.change(source, name, lambda _: ("F8_E4M3", codes))
    official.change(source, scale, lambda _: ("F8_E8M0", scales))


def test_bf16_rounds_float32_matrices_once(small_source, tmp_path):
    """A source may hold plain float32; `bf16` then says that it rounds, and rounds to nearest."""
    source = official.copy(small_source, tmp_path / "source")
    rng = np.random.default_rng(0)
    values = rng.normal(size=official.tensors(source)["head.weight"][1].shape).astype(np.float32)
    official.change(source, "head.weight", lambda _: ("F32", values))
    convert(source, tmp_path / "out", "bf16", progress=False)
    directory = ModelDirectory.open(tmp_path / "out")
    want = np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32))
    assert np.array_equal(stored_values(directory)["head.weight"], want)
    assert directory.manifest["tensors"]["head.weight"]["lossless"] is False
    errors = {c.name: c.error for c in verify(tmp_path / "out", source, progress=False)}
    assert 0 < errors.pop("head.weight") < 2**-8
    assert set(errors.values()) == {0.0}


@pytest.fixture(scope="module")
def source_0731(small_source, tmp_path_factory):
    """The same main stack with three draft modules of another kind."""
    source = official.copy(small_source, tmp_path_factory.mktemp("0731") / "source")
    for module in (1, 2):
        for name, tensor in official.tensors(small_source).items():
            if name.startswith("mtp.0.attn."):
                official.add(source, name.replace("mtp.0", f"mtp.{module}"), tensor)
    official.edit_config(
        source, compress_ratios=[0, 4, 128, 0, 0, 0], dspark_block_size=4, dspark_layers=3
    )
    return source


def test_0731_converts_without_its_drafts_and_says_so(source_0731, small_dir, tmp_path, capsys):
    convert(source_0731, tmp_path, progress=False)
    assert capsys.readouterr().err.count("note: the 3 draft modules under mtp.") == 1
    directory = ModelDirectory.open(tmp_path)
    assert directory.config.release == "0731"
    assert not [name for name in directory.manifest["tensors"] if name.startswith("mtp.")]
    old, new = official.digests(small_dir), official.digests(tmp_path)
    weights = {n for n in new if n.endswith(".safetensors")}
    assert {n: old[n] for n in weights} == {n: new[n] for n in weights}


def test_0731_encodes_prompts_its_own_way(source_0731, tmp_path):
    convert(source_0731, tmp_path / "a", progress=False)
    convert(source_0731, tmp_path / "b", release="april", progress=False)
    assert [load(tmp_path / d)[0].args.release for d in "ab"] == ["0731", "april"]


def test_april_sources_take_a_release_too(small_source, tmp_path):
    plan = convert(small_source, tmp_path / "out", release="0731", progress=False)
    assert plan.release == "0731"
    assert load(tmp_path / "out")[0].args.release == "0731"


def test_dry_run_names_every_class_and_writes_nothing(small_source, tmp_path):
    plan = convert(small_source, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    listed = {line.split("  ")[0] for line in str(plan).splitlines()}
    components = {e.component for es in inventory(plan.source.config).values() for e in es}
    assert components <= listed
    assert f"{plan.nbytes:,}" in str(plan)


def test_the_plan_states_the_bytes_that_are_written(small_source, small_dir):
    plan = convert(small_source, small_dir.parent / "unused", dry_run=True)
    written = sum(p.stat().st_size for p in small_dir.glob("*.safetensors"))
    assert plan.nbytes == written


def test_a_finished_directory_is_left_alone(small_source, tmp_path, capsys):
    convert(small_source, tmp_path, progress=False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    convert(small_source, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    assert "already complete" in capsys.readouterr().err


def test_another_recipe_needs_overwrite(small_source, tmp_path):
    convert(small_source, tmp_path / "out", progress=False)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="another source, or made by other options; use"):
        convert(small_source, tmp_path / "out", "f32", progress=False)
    convert(small_source, tmp_path / "out", "f32", overwrite=True, progress=False)
    convert(small_source, tmp_path / "fresh", "f32", progress=False)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "notes.txt").unlink()
    assert official.digests(tmp_path / "out") == official.digests(tmp_path / "fresh")


def test_somebody_elses_directory_is_not_written_to(small_source, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="is not empty and holds no conversion"):
        convert(small_source, tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_place_for_a_model(small_source, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file: is not a directory"):
        convert(small_source, tmp_path / "file", overwrite=True, progress=False)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["manifest.json", "convert-journal.jsonl"])
def test_a_model_directory_is_no_source(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="was converted already"):
        convert(tmp_path, tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("other", ["", "manifest.json"])
def test_a_source_is_not_converted_onto_itself(small_source, tmp_path, overwrite, other):
    source = official.copy(small_source, tmp_path / "source")
    (source / (other or "empty")).touch()
    before = official.digests(source)
    with pytest.raises(DataError, match="is the source itself"):
        convert(source, source, overwrite=overwrite, progress=False)
    assert official.digests(source) == before


def test_overwrite_replaces_conversions_only(small_source, tmp_path):
    another = official.copy(small_source, tmp_path / "another")
    before = official.digests(another)
    with pytest.raises(DataError, match="holds no conversion"):
        convert(small_source, another, overwrite=True, progress=False)
    assert official.digests(another) == before


def test_a_full_disk_is_seen_before_anything_is_written(small_source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"bytes are still needed, the disk has 1,000 free"):
        convert(small_source, tmp_path, progress=False)
    assert not list(tmp_path.glob("*.safetensors*"))


@pytest.mark.parametrize("recipe", ["q9", "keep"])
def test_unknown_recipes(small_source, tmp_path, recipe):
    with pytest.raises(DataError, match="there are: official, q2, q2-q4, q4, q2-auto, bf16, f32"):
        convert(small_source, tmp_path / "out", recipe, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_tokenizer_still_converts(small_source, tmp_path, capsys):
    source = official.copy(small_source, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    convert(source, tmp_path / "out", progress=False)
    assert "no tokenizer.json" in capsys.readouterr().err
    assert verify(tmp_path / "out", source, progress=False)
