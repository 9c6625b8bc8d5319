"""Loading a model directory, from the disk or the hub's cache, and what is refused."""

import json
import re
import shutil

import mlx.core as mx
import numpy as np
import processes
import pytest

from ds4mlx import DataError, generate, load, stream_generate
from ds4mlx.engine.load import locate, raise_wired_limit
from ds4mlx.weights.directory import JOURNAL, MANIFEST, canonical


@pytest.fixture
def copy(small_dir, tmp_path):
    """A model directory to spoil."""
    return shutil.copytree(small_dir, tmp_path / "model")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("rounding", ["official", "none"])
def test_both_types_run_and_give_float32_logits(small_dir, dtype, rounding):
    model, tokenizer = load(small_dir, dtype, rounding)
    assert (model.dtype, model.rounding, model.training) == (dtype, rounding, False)
    cache = model.make_cache()
    logits = model(mx.arange(40)[None], cache=cache)
    assert logits.dtype == mx.float32 and logits.shape == (1, 40, 288)
    assert mx.all(mx.isfinite(logits)).item()
    assert len(generate(model, tokenizer, "ab", 3)) > 0


def test_bfloat16_is_the_default_and_close_to_float32(small_dir, small_model):
    ids = mx.arange(20)[None]
    model, _ = load(str(small_dir))
    assert model.dtype == mx.bfloat16
    chances, exact = (np.array(mx.softmax(m(ids), axis=-1)) for m in (model, small_model))
    assert 0 < np.abs(chances - exact).max() < 0.2


def test_the_files_are_counted(small_dir):
    told = []
    load(small_dir, on_file=lambda *now: told.append(now))
    count = len(list(small_dir.glob("*.safetensors")))
    assert told == [(done, count) for done in range(1, count + 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "some"}, "rounding must be 'official' or 'none', not 'some'"),
        (
            {"dtype": mx.float16},
            r"dtype must be mlx.core.bfloat16 or float32, not mlx.core.float16",
        ),
    ],
)
def test_wrong_arguments(small_dir, options, message):
    with pytest.raises(DataError, match=message):
        load(small_dir, **options)


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "./a", "/nowhere/model", "~/nothing/here"])
def test_a_directory_that_does_not_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such directory$"):
        load(name)


def test_a_directory_that_is_no_model(small_source, tmp_path):
    file = tmp_path / "my model.gguf"
    file.write_bytes(b"GGUF")
    others = {
        tmp_path: "no manifest.json: not a converted model",
        small_source: f"is an unconverted checkpoint; .*: ds4mlx convert {small_source} DIR",
        file: f"is a GGUF file, not a converted model; .*: ds4mlx convert '{file}' DIR",
    }
    for path, message in others.items():
        with pytest.raises(DataError, match=f"{re.escape(str(path))}: {message}"):
            load(path)


def test_an_unfinished_conversion(copy):
    (copy / MANIFEST).unlink()
    (copy / JOURNAL).write_text("")
    with pytest.raises(DataError, match="its conversion is not finished: run the same"):
        load(copy)


def test_a_file_of_another_size_is_named(copy):
    with (copy / "layers.1.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=r"layers\.1\.safetensors: has [0-9]+ bytes, expected"):
        load(copy)


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 320), ("swiglu_limit", 12.0), ("o_groups", 2)]
)
def test_an_edited_configuration(copy, key, value):
    """Whether or not a tensor's shape or the file's size tells."""
    config = json.loads((copy / "config.json").read_text())
    config[key] = value
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (copy / "config.json").write_text(text)
    with pytest.raises(DataError, match=re.escape(str(copy))):
        load(copy)


def test_an_edited_tokenizer(copy):
    raw = (copy / "tokenizer.json").read_bytes()
    (copy / "tokenizer.json").write_bytes(raw.replace(b"100", b"101", 1))
    with pytest.raises(DataError, match=r"tokenizer\.json: was changed after the conversion"):
        load(copy)


def test_a_model_without_a_tokenizer_works_on_token_ids(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / "tokenizer.json").unlink()
    del manifest["files"]["tokenizer.json"]
    (copy / MANIFEST).write_bytes(canonical(manifest))
    model, tokenizer = load(copy)
    given = list(stream_generate(model, tokenizer, [5, 6, 7], 4))
    assert [r.text for r in given] == [""] * len(given) and given[0].token is not None
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file, so text cannot be enc"):
        generate(model, tokenizer, "words", 4)


# The hub, without a network: what it would have downloaded lies in its cache.


def in_hub_cache(hub, name, source):
    """Put files where the hub keeps the snapshots of a repository."""
    repo, commit = hub / f"models--{name.replace('/', '--')}", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(source, repo / "snapshots" / commit)


def generate_from(name, hub):
    arguments = ["generate", "-m", name, "-p", "ab", "--raw", "--max-tokens", "3"]
    return processes.run(*arguments, HF_HUB_CACHE=hub, HF_HUB_OFFLINE=1)


def test_a_hub_repository_is_found_in_the_hubs_cache(small_dir, tmp_path):
    in_hub_cache(tmp_path, "somebody/model", small_dir)
    done = generate_from("somebody/model", tmp_path)
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize("name", ["nobody/nothing", "no body/x", "a/.."])
def test_an_unknown_hub_repository(name, tmp_path):
    done = generate_from(name, tmp_path)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1 and done.stdout == b""
    assert line.startswith(f"error: {name}: no such directory, and not found on the hub: ")


def test_a_cached_repository_of_another_kind(small_source, tmp_path):
    in_hub_cache(tmp_path, "somebody/official", small_source)
    done = generate_from("somebody/official", tmp_path)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1 and line.startswith("error: somebody/official: ")


def test_a_directory_comes_before_the_hub(small_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(small_dir.parent)
    assert locate(f"./{small_dir.name}").is_dir()
    monkeypatch.chdir(small_dir.parent.parent)
    assert locate(f"{small_dir.parent.name}/{small_dir.name}").is_dir()


def test_the_wired_limit_is_metals_recommendation():
    """Setting it twice returns what the first call set; without Metal nothing is set."""
    before = mx.set_wired_limit(0)
    try:
        raise_wired_limit()
        on_metal = mx.metal.is_available() and mx.default_device() == mx.gpu
        best = mx.device_info().get("max_recommended_working_set_size", 0) if on_metal else 0
        assert mx.set_wired_limit(0) == best
    finally:
        mx.set_wired_limit(before)
