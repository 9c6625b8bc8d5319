"""Adapters on disk: trained by mlx-lm's own trainer, saved, loaded, merged; and those of other models."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner import TrainingArgs, train
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import evaluate
from mlx_lm.tuner.utils import load_adapters
from typer.testing import CliRunner

from ds4mlx import DataError, KVStore, generate, load
from ds4mlx.cli.main import app
from ds4mlx.convert import merge, verify
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.research import add_lora, load_adapter, remove_lora, save_adapter
from ds4mlx.weights.directory import MANIFEST, read_manifest

COLOURS = ("red", "blue", "green", "white")
FILES = ("adapters.safetensors", "adapter_config.json")


def sentences(numbers):
    """English of one kind, which the small model has never read."""
    texts = (f"House {n} is {COLOURS[n % 4]}, and so is door {n}.\n" for n in numbers)
    return [{"text": text} for text in texts]


@pytest.fixture(scope="module")
def trained(embedded_dir, tmp_path_factory):
    """Held-out losses before and after a few steps of mlx-lm's trainer, and where it has saved."""
    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = load(embedded_dir, dtype=mx.float32)
    decode_weights(model)
    mx.random.seed(1)
    np.random.seed(1)  # the trainer's order of the texts
    add_lora(model, rank=4, layers=[3, 4])
    told, held = (
        CacheDataset(TextDataset(sentences(numbers), tokenizer))
        for numbers in (range(10, 26), range(60, 64))
    )
    before = evaluate(model, held, 4, 1)
    args = TrainingArgs(iters=4, batch_size=3, adapter_file=str(folder / FILES[0]))
    mx.disable_compile()  # whose CPU back-end takes minutes
    try:
        train(model, optim.Adam(1e-3), told, args=args)
    finally:
        mx.enable_compile()
    save_adapter(model, folder / "saved")
    model.eval()
    return model, folder, before, evaluate(model, held, 4, 1)


@pytest.fixture(scope="module")
def adapter(trained):
    """The directory of the trained adapter."""
    return trained[1] / "saved"


def test_training_lowers_the_loss_of_other_texts(trained):
    _, _, before, after = trained
    assert after < 0.8 * before


IDS = mx.array([[0, 17, 300, 5, 80, 1200, 44, 9, 2000, 3]])


def test_what_is_saved_is_what_was_trained(trained, adapter, embedded_dir):
    """Bit for bit: in the file of mlx-lm's trainer, in a loaded model, and through mlx-lm's loader."""
    model, folder, *_ = trained
    own, theirs = (mx.load(str(path)) for path in (adapter / FILES[0], folder / FILES[0]))
    assert own.keys() == theirs.keys() and all((own[n] == theirs[n]).all() for n in own)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == own.keys()
    loaded = load(embedded_dir, dtype=mx.float32, adapter=adapter)[0]
    others = load(embedded_dir, dtype=mx.float32)[0]
    plain = others(IDS)
    load_adapters(others, str(adapter))
    want = loaded(IDS)
    assert (others(IDS) == want).all() and mx.abs(plain - want).max() > 0.1
    for each in (loaded, model):
        decode_weights(each)
    assert (loaded(IDS) == model(IDS)).all()
    remove_lora(others)
    assert (others(IDS) == plain).all()


def test_an_adapter_of_the_form_is_all_that_is_taken(trained, adapter, embedded_dir, tmp_path):
    model = load(embedded_dir, dtype=mx.float32, adapter=adapter)[0]
    with pytest.raises(DataError, match="has adapters already"):
        load_adapter(model, adapter)
    with pytest.raises(DataError, match="has adapters already"):
        add_lora(model)
    model.layers[3].attn.wkv.scale = 3.0
    with pytest.raises(DataError, match="adapters differ in rank, scale or dropout"):
        save_adapter(model, tmp_path)
    remove_lora(model)
    with pytest.raises(DataError, match="adapters are none"):
        save_adapter(model, tmp_path)


def changed(adapter, tmp_path, change=None, **config):
    """A copy of an adapter with other arrays or another configuration."""
    copy = Path(shutil.copytree(adapter, tmp_path / "other"))
    if change is not None:
        arrays = dict(mx.load(str(copy / FILES[0])))
        change(arrays)
        mx.save_safetensors(str(copy / FILES[0]), arrays)
    values = json.loads((copy / FILES[1]).read_text())
    values["lora_parameters"] |= config.pop("lora", {})
    (copy / FILES[1]).write_text(json.dumps(values | config))
    return copy


def put(name, make):
    return lambda arrays: arrays.update({name: make(arrays.get(name))})


WKV = "layers.3.attn.wkv.lora_a"
WRONG = {
    "a layer that is not there": (
        {"change": put("layers.9.attn.wkv.lora_a", lambda _: mx.zeros((256, 4)))},
        r"no matrix layers\.9\.attn\.wkv .* another model",
    ),
    "another width": (
        {"change": put(WKV, lambda _: mx.zeros((512, 4)))},
        r"layers\.3\.attn\.wkv\.lora_a is \[512, 4\].*\[256, 256\] and rank 4 it must be \[256, 4\]",
    ),
    "half a pair": ({"change": lambda arrays: arrays.pop(WKV)}, r"wkv\.lora_a is missing"),
    "what is no adapter": (
        {"change": put("layers.3.attn.wkv.m", lambda _: mx.zeros(4))},
        r"layers\.3\.attn\.wkv\.m is no part of an adapter",
    ),
    "a norm": (
        {"change": put("layers.3.attn_norm.lora_a", lambda _: mx.zeros((256, 4)))},
        r"no matrix layers\.3\.attn_norm",
    ),
    "NaN": (
        {"change": put(WKV, lambda a: mx.where(mx.arange(4) == 1, mx.nan, a))},
        r"adapters\.safetensors: tensor layers\.3\.attn\.wkv\.lora_a holds a value .* not finite",
    ),
    "integers": ({"change": put(WKV, lambda a: a.astype(mx.int32))}, "is I32, not a float"),
    "another rank": ({"lora": {"rank": 8}}, "and rank 8 it must be"),
    "no scale": ({"lora": {"scale": None}}, r"adapter_config\.json: .* no usable scale"),
    "a scale without end": ({"lora": {"scale": float("inf")}}, "no usable scale"),
    "half a rank": ({"lora": {"rank": 1.5}}, "rank must be a whole number"),
    "another kind": ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_adapters_of_other_models_and_damaged_ones(small_adapter_target, adapter, tmp_path, what):
    changes, message = WRONG[what]
    with pytest.raises(DataError, match=message):
        load_adapter(small_adapter_target, changed(adapter, tmp_path, **changes))


@pytest.fixture(scope="module")
def small_adapter_target(embedded_dir):
    """A model that is given only what it must refuse."""
    return load(embedded_dir, dtype=mx.float32)[0]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kept", [0, 5, 300])
def test_truncated_files(small_adapter_target, adapter, tmp_path, file, kept):
    copy = changed(adapter, tmp_path)
    (copy / file).write_bytes((copy / file).read_bytes()[:kept])
    with pytest.raises(DataError, match=f"{file}: "):
        load_adapter(small_adapter_target, copy)
    (copy / file).unlink()
    with pytest.raises(DataError, match=f"{file}: No such file"):
        load_adapter(small_adapter_target, copy)


def test_states_with_and_without_an_adapter_are_not_exchanged(embedded_dir, adapter, tmp_path):
    plain, adapted, again = (
        load(embedded_dir, dtype=mx.float32, adapter=each)[0] for each in (None, adapter, adapter)
    )
    assert adapted.kind == again.kind != plain.kind
    again.layers[3].attn.wkv.scale *= 2
    assert adapted.kind != again.kind
    state, tokens = plain.make_cache(), IDS[0].tolist()
    plain(IDS, cache=state)
    with KVStore(tmp_path / "kv", 1 << 30, plain) as store:
        store.save(tokens, state, reason="cold")
        assert store.restore(tokens)[1] == len(tokens)
    with KVStore(tmp_path / "kv", 1 << 30, adapted) as store:
        assert store.restore(tokens)[1] == 0


@pytest.fixture(scope="module")
def merged(embedded_dir, adapter, tmp_path_factory):
    """The embedded model with the adapter merged into its matrices."""
    target = tmp_path_factory.mktemp("merged") / "model"
    merge(embedded_dir, adapter, target, progress=False)
    return target


def test_a_merged_model_is_the_adapted_one(embedded_dir, adapter, merged):
    want = load(embedded_dir, dtype=mx.float32, adapter=adapter)[0](IDS)
    plain = load(embedded_dir, dtype=mx.float32)[0](IDS)
    got = load(merged, dtype=mx.float32)[0](IDS)
    # The mean, for a token whose experts nearly tie may take others by a rounding of the matrices.
    moved, lost = mx.abs(want - plain).mean().item(), mx.abs(got - want).mean().item()
    assert lost < 0.05 * moved


def test_a_merged_directory(embedded_dir, adapter, merged):
    """Adapted matrices are bfloat16, within a rounding of the sum; everything else keeps its bytes."""
    assert all(each.cause is None for each in verify(merged, progress=False))
    before, after = read_manifest(embedded_dir)["tensors"], read_manifest(merged)["tensors"]
    learnt = mx.load(str(adapter / FILES[0]))
    names = {name.rpartition(".")[0] for name in learnt}
    for name, listed in after.items():
        if name.removesuffix(".weight") in names:
            assert listed["format"] == "bf16" and not listed["lossless"]
        else:
            assert listed == before[name]
    plain, model = (load(path, dtype=mx.float32)[0] for path in (embedded_dir, merged))
    for name in names:
        a, b = learnt[f"{name}.lora_a"], learnt[f"{name}.lora_b"]
        matrix, was = (dict(m.named_modules())[name] for m in (model, plain))
        want = was.decode() + 20 * (a @ b).T
        assert mx.allclose(matrix.decode(), want, rtol=2**-8, atol=1e-6), name


def test_merging_again(embedded_dir, adapter, merged, tmp_path):
    """Nothing is done twice; what was interrupted goes on; another adapter needs to be told."""
    stamp = (merged / MANIFEST).stat().st_mtime_ns
    merge(embedded_dir, adapter, merged, progress=False)
    assert (merged / MANIFEST).stat().st_mtime_ns == stamp
    other = changed(adapter, tmp_path, lora={"scale": 1.0})
    with pytest.raises(DataError, match="use --overwrite"):
        merge(embedded_dir, other, merged, progress=False)
    with pytest.raises(DataError, match="is the source itself"):
        merge(embedded_dir, adapter, embedded_dir, progress=False)


def test_a_copied_weight_that_is_damaged(embedded_dir, adapter, tmp_path):
    base = Path(shutil.copytree(embedded_dir, tmp_path / "base"))
    file = base / "layers.1.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"layers\.1\.safetensors: tensor .* does not match"):
        merge(base, adapter, tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged" / MANIFEST).exists()


def test_an_adapter_that_makes_infinities(embedded_dir, adapter, tmp_path):
    endless = changed(adapter, tmp_path, put(WKV.replace("_a", "_b"), lambda b: b + 1e38))
    with pytest.raises(DataError, match=r"layers\.3\.attn\.wkv\.weight that are not finite"):
        merge(embedded_dir, endless, tmp_path / "merged", progress=False)


def test_commands(embedded_dir, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("DS4MLX_MODEL", str(embedded_dir))
    asked = ["--raw", "--temp", "0", "--max-tokens", "12", "House 61 is"]
    model, tokenizer = load(embedded_dir, dtype=mx.float32, adapter=adapter)
    done = CliRunner().invoke(app, ["generate", "--adapter", str(adapter), *asked])
    assert done.exit_code == 0, done.output
    ids = tokenizer.encode("House 61 is")
    assert done.stdout.rstrip("\n") == generate(model, tokenizer, ids, max_tokens=12).rstrip("\n")
    done = CliRunner().invoke(app, ["generate", *asked])
    assert done.stdout.rstrip("\n") != generate(model, tokenizer, ids, max_tokens=12).rstrip("\n")
    text = tmp_path / "held.txt"
    text.write_text("".join(each["text"] for each in sentences(range(60, 72))))
    measured = []
    for more in ([], ["--adapter", str(adapter)]):
        done = CliRunner().invoke(app, ["eval", "--text", str(text), "--json", *more])
        assert done.exit_code == 0, done.output
        measured.append(json.loads(done.stdout))
    assert measured[1] != measured[0]
    done = CliRunner().invoke(app, ["merge", str(adapter), str(tmp_path / "new")])
    assert done.exit_code == 0 and (tmp_path / "new" / MANIFEST).exists()
