"""Models of random weights: every recipe computes, and a written one is a sound directory."""

import json

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from ds4mlx import DataError, load
from ds4mlx.bench.synth import RECIPES, config_like, format_of, synth_model
from ds4mlx.bench.synth_directory import write_synth
from ds4mlx.bench.whole_model import synthetic_state
from ds4mlx.cli.main import app
from ds4mlx.config import ModelConfig
from ds4mlx.convert import verify
from ds4mlx.custom_kernels.random_weights import random_planes, random_words
from ds4mlx.formats import FORMATS
from ds4mlx.weights.inventory import inventory

SMALL = ModelConfig(
    hidden_size=256,
    moe_intermediate_size=256,
    num_hidden_layers=3,
    num_nextn_predict_layers=0,
    num_hash_layers=1,
    compress_ratios=(0, 4, 128),
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=64,
    n_routed_experts=8,
    num_experts_per_tok=3,
    index_n_heads=4,
    index_head_dim=64,
    index_topk=8,
    vocab_size=288,
)


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("i32", "q6_k", "iq3_xxs")])
def test_weights_are_scaled_to_their_width(name):
    weight = np.array(FORMATS[name].decode(random_planes(name, (16, 4096), 1)).astype(mx.float32))
    assert 0.7 < weight.std() * 64 < 1.6 and abs(weight.mean()) < 0.2 * weight.std()


def test_words_take_every_value():
    words = np.array(random_words((1 << 16,), 3)).view(np.uint8)
    counts = np.bincount(words, minlength=256)
    assert counts.min() > 0.8 * words.size / 256 and counts.max() < 1.2 * words.size / 256


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_in_memory(recipe):
    model = synth_model(SMALL, recipe, mx.float32)
    logits = model(mx.arange(40)[None])
    assert np.isfinite(np.array(logits)).all() and float(logits.std()) > 0.1
    for listed in inventory(SMALL).values():
        for entry in listed:
            if entry.kind == "experts":
                module = dict(model.named_modules())[entry.module]
                assert module.format == format_of(recipe, entry, SMALL)


@pytest.mark.parametrize("recipe", ["q2", "keep"])
def test_a_written_model_is_sound(recipe, tmp_path):
    write_synth(SMALL, recipe, tmp_path / "model")
    assert verify(tmp_path / "model")
    loaded, _ = load(tmp_path / "model", dtype=mx.float32)
    tokens = mx.arange(20)[None]
    assert mx.array_equal(loaded(tokens), synth_model(SMALL, recipe, mx.float32)(tokens))


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(DataError, match="is not an empty directory"):
        write_synth(SMALL, "q2", tmp_path)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(tmp_path, before, end):
    """So that the same command can be given again."""
    target = tmp_path / "model"
    if before:
        target.mkdir()

    def interrupt(done, _):
        if done == 2:
            raise end

    with pytest.raises((KeyboardInterrupt, DataError)):
        write_synth(SMALL, "q2", target, interrupt)
    assert target.exists() == before and not list(tmp_path.glob("model/*"))
    assert write_synth(SMALL, "q2", target) > 0


def test_one_process_writes_at_a_time(tmp_path):
    def again(*_):
        for path in tmp_path.iterdir():
            path.unlink()  # as empty as it is before the first file is there
        with pytest.raises(DataError, match="another process is writing here"):
            write_synth(SMALL, "q2", tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synth(SMALL, "q2", tmp_path, again)


def test_real_shapes():
    flash, pro = config_like("flash"), config_like("pro")
    assert (flash.num_hidden_layers, pro.num_hidden_layers) == (43, 61)
    assert pro.compress_ratios[:3] == (128, 128, 4) and pro.compress_ratios[60] == 4
    assert config_like("flash", 5).compress_ratios == (0, 0, 4, 128, 4)
    with pytest.raises(DataError, match="flash has 43 layers, not 44"):
        config_like("flash", 44)


def test_a_synthetic_state_is_shaped_like_a_real_one():
    model = synth_model(SMALL, "q2", mx.float32)
    real = model.make_cache()
    mx.eval(model(mx.arange(150)[None] % 288, cache=real))
    made = synthetic_state(model, 150)
    assert made.offset == real.offset == 150
    shape = lambda cache: [(p.end, p.buffer.dtype) for layer in cache for p in parts(layer)]
    assert shape(made) == shape(real)
    counts = [[c.rows.count for layer in s for c in layer.compressors] for s in (made, real)]
    assert counts[0] == counts[1]


def test_decoding_goes_on_from_a_synthetic_state_at_a_boundary():
    """2,048 tokens are where a read-in prompt sets a boundary record aside."""
    model = synth_model(SMALL, "q2", mx.float32)
    made = synthetic_state(model, 2048)
    mx.eval(model.last_logits(mx.array([[1]]), made))
    assert made.offset == 2049 and not made.records


def parts(layer):
    return [layer.window, *(c.recent for c in layer.compressors)]


def test_command_line(monkeypatch):
    monkeypatch.setattr("ds4mlx.bench.synth.config_like", lambda like, layers: SMALL)
    options = ["--in-memory", "--bench", "--prompt", "20", "--gen", "1", "--json"]
    done = CliRunner().invoke(app, ["synth", *options])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert [row["depth"] for row in found["rows"]] == [20]
    assert found["kernels"] == (mx.default_device() == mx.gpu)
    wrong = (["synth"], ["synth", "DIR", "--in-memory"], ["bench", "--prompt", "x"])
    assert all(CliRunner().invoke(app, arguments).exit_code == 2 for arguments in wrong)
    if mx.default_device() == mx.cpu:
        assert CliRunner().invoke(app, ["bench", "--kernels"]).exit_code == 1
