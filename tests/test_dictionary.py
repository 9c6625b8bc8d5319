"""Dictionaries of features in SAELens's form: the same features as its formulas give, and steering by them."""

import json

import mlx.core as mx
import numpy as np
import pytest
from ahead import IDS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import run

from ds4mlx import DataError
from ds4mlx.research import Dictionary

KINDS = ("standard", "topk", "jumprelu", "gated")
VECTORS = {"standard": ["b_enc"], "topk": ["b_enc"], "jumprelu": ["b_enc", "threshold"]}
VECTORS["gated"] = ["b_gate", "b_mag", "r_mag"]


def written(folder, kind, width=8, features=24, seed=0, dtype=mx.float32, **changes):
    """The two files, and the arrays as float64."""
    rng = np.random.default_rng(seed)
    arrays = {
        "W_enc": rng.normal(size=(width, features)) / np.sqrt(width),
        "W_dec": rng.normal(size=(features, width)) / np.sqrt(width),
        "b_dec": rng.normal(size=width),
    }
    arrays |= {name: 0.3 * rng.normal(size=features) for name in VECTORS[kind]}
    if "threshold" in arrays:
        arrays["threshold"] = np.abs(arrays["threshold"])
    stored = {name: mx.array(each).astype(dtype) for name, each in arrays.items()}
    config = {
        "d_in": width,
        "d_sae": features,
        "dtype": "float32",
        "architecture": kind,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }
    if kind == "topk":
        config["k"] = 3
    config |= changes
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "sae_weights.safetensors"), stored)
    (folder / "cfg.json").write_text(json.dumps(config))
    return {name: np.array(each.astype(mx.float32), np.float64) for name, each in stored.items()}


def features_of(kind, x, a, centred=True, k=3):
    """As the formulas say, in float64."""
    c = x - a["b_dec"] * centred
    if kind == "gated":
        gate, size = (
            c @ a["W_enc"] + a["b_gate"],
            c @ (a["W_enc"] * np.exp(a["r_mag"])) + a["b_mag"],
        )
        return np.where(gate > 0, np.maximum(size, 0), 0)
    before = c @ a["W_enc"] + a["b_enc"]
    if kind == "jumprelu":
        return np.where(before > a["threshold"], np.maximum(before, 0), 0)
    if kind == "topk":
        floor = np.sort(before, axis=-1)[..., -k][..., None]
        before = np.where(before >= floor, before, 0)
    return np.maximum(before, 0)


@settings(max_examples=30)
@given(
    st.sampled_from(KINDS),
    st.booleans(),
    st.integers(0, 1 << 32),
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
)
def test_features_values_and_errors(tmp_path_factory, kind, centred, seed, shape, dtype):
    folder = tmp_path_factory.getbasetemp() / "dictionary"
    a = written(folder, kind, seed=seed, dtype=dtype, apply_b_dec_to_input=centred)
    made, x = Dictionary(folder), np.random.default_rng(seed + 1).normal(size=(*shape, 8)) * 2
    want = features_of(kind, x, a, centred)
    got = np.array(made.encode(mx.array(x)))
    assert got.shape == (*shape, 24) and np.abs(got - want).max(initial=0) < 1e-4
    assert (got >= 0).all() and (kind != "topk" or ((got > 0).sum(-1) <= 3).all())
    back = want @ a["W_dec"] + a["b_dec"]
    assert np.abs(np.array(made.decode(mx.array(want))) - back).max(initial=0) < 1e-4
    assert np.abs(np.array(made.error(mx.array(x))) - (x - back)).max(initial=0) < 1e-3


def test_older_configurations(tmp_path):
    """Topk by its activation, options in a dictionary of their own, no architecture, no bias flag."""
    a = written(tmp_path, "topk", activation_fn_str="topk", activation_fn_kwargs={"k": 3})
    config = json.loads((tmp_path / "cfg.json").read_text())
    for key in ("architecture", "k", "apply_b_dec_to_input", "normalize_activations"):
        del config[key]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    x = np.random.default_rng(1).normal(size=(5, 8))
    got = np.array(Dictionary(tmp_path).encode(mx.array(x)))
    assert np.abs(got - features_of("topk", x, a)).max() < 1e-5


# At a site of a model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["layers.1.ffn.out", "layers.1.streams"])
def test_features_are_read_and_steered_at_a_site(small_model, tmp_path, kind, name):
    """What is added to, or set, is exactly so much of the features' directions; all else stays."""
    a = written(tmp_path, kind, 128, 40)
    made, ids = Dictionary(tmp_path), IDS[:9]
    with small_model.trace(name) as plain:
        run(small_model, ids)
    value = np.array(plain[name]).astype(np.float64)
    now = features_of(kind, value, a)
    assert np.abs(np.array(made.encode(plain[name])) - now).max() < 1e-3
    for edit, change in (
        (made.add({3: 2.0, 5: -1.0}), np.broadcast_to([2.0, -1.0], (*now.shape[:-1], 2))),
        (made.set({3: 4.0, 5: 0.0}), np.array([4.0, 0.0]) - now[..., [3, 5]]),
    ):
        with small_model.intervene({name: edit}), small_model.trace(name) as t:
            run(small_model, ids)
        want = value + change @ a["W_dec"][[3, 5]]
        assert np.abs(np.array(t[name]) - want).max() < 1e-3
    with small_model.intervene({name: made.reconstruct()}), small_model.trace(name) as t:
        run(small_model, ids)
    assert np.abs(np.array(t[name]) - (now @ a["W_dec"] + a["b_dec"])).max() < 1e-3


def test_a_feature_is_a_direction_to_steer_by(small_model, tmp_path):
    a = written(tmp_path, "jumprelu", 128, 40)
    made, name = Dictionary(tmp_path), "layers.2.streams"
    with small_model.intervene({name: made.add({7: 1.5})}):
        want = run(small_model, IDS[:9])
    with small_model.steer(made.steering(7, "streams", 2), 1.5):
        assert np.abs(run(small_model, IDS[:9]) - want).max() < 1e-4
    assert np.abs(made.direction(7) - a["W_dec"][7]).max() < 1e-6
    assert repr(made) == "Dictionary(jumprelu, 128 -> 40)"


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "transcoder"}, "architecture is 'transcoder', and only standard, topk"),
        ({"architecture": ["topk"]}, "architecture is"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm is True"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor is True"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str is 'tanh-relu'"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes'"),
        ({"d_in": 0}, "d_in is 0"),
        ({"d_in": True}, "d_in is True"),
        ({"d_sae": None}, "d_sae is None"),
        ({"architecture": "topk"}, "k is None"),
        ({"architecture": "topk", "k": 25}, "k is 25, of 24 features"),
        ({"architecture": "jumprelu"}, "tensor threshold is missing"),
        ({"architecture": "gated"}, "gated dictionaries have no b_enc"),
        ({"d_in": 9}, r"W_enc is F32 \[8, 24\], not a float of \[9, 24\]"),
    ],
)
def test_other_dictionaries_are_refused_by_name(tmp_path, changes, message):
    written(tmp_path, "standard", **changes)
    with pytest.raises(DataError, match=f"(cfg.json|safetensors): .*{message}"):
        Dictionary(tmp_path)


def test_damaged_files(tmp_path):
    with pytest.raises(DataError, match=r"cfg\.json: No such file"):
        Dictionary(tmp_path)
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ("[" * 9999, "no JSON"),
    ):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(DataError, match=message):
            Dictionary(tmp_path)
    written(tmp_path, "standard")
    weights = tmp_path / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for raw, message in (
        (whole[:-4], "truncated"),
        (whole[:-4] + np.float32(np.inf).tobytes(), "not finite"),
        (b"", "not a safetensors file"),
    ):
        weights.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            Dictionary(tmp_path)
    weights.unlink()
    with pytest.raises(DataError, match=r"sae_weights\.safetensors: No such file"):
        Dictionary(tmp_path)


def test_values_and_features_that_do_not_fit(tmp_path):
    written(tmp_path, "standard")
    made = Dictionary(tmp_path)
    with pytest.raises(DataError, match="of 8 channels, and the value has 7"):
        made.encode(mx.zeros((2, 7)))
    for use in (made.direction, lambda n: made.add({n: 1}), lambda n: made.set({n: 1})):
        for number in (-1, 24):
            with pytest.raises(DataError, match=f"24 features, and no {number}"):
                use(number)
