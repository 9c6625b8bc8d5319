"""config.json: no value that changes a result is ever guessed, under whatever name it stands."""

import copy
import json

import pytest

from ds4mlx import DataError, ModelConfig
from ds4mlx.config_keys import LAYER_TYPES
from ds4mlx.engine.default_model import EMBEDDED

OFFICIAL = json.loads((EMBEDDED / "config.json").read_text())
# These decide nothing: one value of each is supported, or the forward pass never asks.
UNUSED = {
    *("architectures", "attention_bias", "attention_dropout", "expert_dtype", "hidden_act"),
    *("initializer_range", "n_shared_experts", "norm_topk_prob", "num_key_value_heads"),
    *("quantization_config", "scoring_func", "tie_word_embeddings", "topk_method"),
    *("torch_dtype", "transformers_version", "use_cache"),
}
LAYERS = OFFICIAL["num_hidden_layers"]
WORDS = {ratio: word for word, ratio in LAYER_TYPES.items()}


def read(values) -> ModelConfig:
    return ModelConfig.from_dict(values, "config.json")


WANTED = read(OFFICIAL)


@pytest.mark.parametrize("key", OFFICIAL)
@pytest.mark.parametrize("null", [False, True])
def test_a_key_is_required_or_decides_nothing(key, null):
    values = {k: v for k, v in OFFICIAL.items() if k != key}
    if null and key not in UNUSED:
        values[key] = None
    if key in UNUSED:
        assert read(values) == WANTED
        return
    with pytest.raises(DataError, match=rf"config\.json: .*{key}"):
        read(values)


@pytest.mark.parametrize("key", OFFICIAL["rope_scaling"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_every_parameter_of_yarn_is_required(name, key):
    values = copy.deepcopy(OFFICIAL)
    values[name] = values.pop("rope_scaling")
    assert read(values) == WANTED
    del values[name][key]
    with pytest.raises(DataError, match=rf"config\.json: missing {name}\.{key}"):
        read(values)


YARN = OFFICIAL["rope_scaling"]
FLAT = {("rope_type" if k == "type" else k): v for k, v in YARN.items()}
MAIN = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
COMPRESS = {**FLAT, "rope_theta": 160000, "partial_rotary_factor": 0.25, "attention_factor": 1.0}
BRANCHES = {"main": MAIN, "compress": COMPRESS}
TYPES = [WORDS[ratio] for ratio in OFFICIAL["compress_ratios"][:LAYERS]]
RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
MIXTURES = ["hash_moe"] + ["moe"] * (LAYERS - 1)

# (keys taken away, keys put there)
RENAMED = [
    (["rope_scaling"], {"rope_parameters": FLAT}),
    (["rope_scaling"], {"rope_parameters": YARN}),
    (["rope_scaling"], {"rope_parameters": BRANCHES}),
    (["rope_scaling", "rope_theta", "compress_rope_theta"], {"rope_parameters": BRANCHES}),
    (["rope_scaling"], {"rope_parameters": {**FLAT, "rope_theta": 10000}}),
    ([], {"rope_parameters": BRANCHES}),
    (["rope_scaling"], {"rope_scaling": FLAT}),
    (["n_routed_experts"], {"num_local_experts": 8}),
    (["qk_rope_head_dim"], {"partial_rotary_factor": 0.25}),
    (["num_hash_layers"], {"mlp_layer_types": MIXTURES}),
    ([], {"layer_types": TYPES, "compress_rates": RATES}),
]
CONTRADICTIONS = [
    (["rope_scaling"], {"rope_parameters": {**FLAT, "mscale": 1.0}}, "mscale"),
    (["rope_scaling"], {"rope_parameters": {**FLAT, "type": "linear"}}, "two types"),
    (["rope_scaling"], {"rope_parameters": {**FLAT, "rope_type": "llama3"}}, "rope_scaling.type"),
    (["rope_scaling"], {"rope_parameters": {**FLAT, "attention_factor": 1.2}}, "attention_factor"),
    (["rope_scaling"], {"rope_parameters": {**FLAT, "rope_theta": 9}}, "rope_theta"),
    (["rope_scaling"], {"rope_parameters": [1]}, "rope_parameters"),
    ([], {"rope_parameters": {**FLAT, "factor": 4}}, "rope_parameters says that rope_scaling"),
    (
        ["rope_scaling"],
        {"rope_parameters": {"main": {**MAIN, "rope_theta": 5}, "compress": COMPRESS}},
        "rope_theta",
    ),
    (["rope_scaling"], {"rope_parameters": {"main": MAIN}}, "missing rope_parameters.factor"),
    ([], {"num_local_experts": 9}, "num_local_experts says that n_routed_experts"),
    ([], {"partial_rotary_factor": 0.5}, "partial_rotary_factor says that qk_rope_head_dim"),
    ([], {"mlp_layer_types": MIXTURES[::-1]}, "mlp_layer_types must be"),
    ([], {"mlp_layer_types": ["moe"] * LAYERS}, "mlp_layer_types says that num_hash_layers"),
    ([], {"layer_types": TYPES[::-1]}, "layer_types says that compress_ratios"),
    ([], {"layer_types": ["full_attention"] * LAYERS}, "layer_types names"),
    ([], {"compress_rates": {**RATES, "compressed_sparse_attention": 8}}, "compress_rates"),
    ([], {"scoring_func": "sigmoid"}, "scoring_func"),
    ([], {"norm_topk_prob": False}, "norm_topk_prob"),
    ([], {"n_shared_experts": 2}, "n_shared_experts"),
]


@pytest.mark.parametrize(("without", "put"), RENAMED)
def test_the_same_values_under_other_names(without, put):
    assert read({k: v for k, v in OFFICIAL.items() if k not in without} | put) == WANTED


def test_layer_types_need_no_compress_ratios():
    """They end with the main layers; the MTP block has no compressor anyway."""
    values = {k: v for k, v in OFFICIAL.items() if k != "compress_ratios"}
    config = read({**values, "layer_types": TYPES})
    assert [config.ratio(i) for i in range(LAYERS + 1)] == OFFICIAL["compress_ratios"]


@pytest.mark.parametrize(("without", "put", "cause"), CONTRADICTIONS)
def test_what_contradicts_or_is_not_known_is_named(without, put, cause):
    with pytest.raises(DataError, match=rf"config\.json: .*{cause}"):
        read({k: v for k, v in OFFICIAL.items() if k not in without} | put)


@pytest.mark.parametrize("key", ["head_dim", "num_hidden_layers"])
def test_a_renamed_key_whose_other_half_is_missing(key):
    put = {"partial_rotary_factor": 0.25, "mlp_layer_types": MIXTURES}
    with pytest.raises(DataError, match=rf"config\.json: .*{key}"):
        read({k: v for k, v in OFFICIAL.items() if k != key} | put)


@pytest.mark.parametrize("value", [3, "x", [[]], {"a": 1}, [{}], True, float("nan"), 1e300])
@pytest.mark.parametrize(
    "key",
    [
        *("rope_scaling", "rope_parameters", "layer_types", "mlp_layer_types", "compress_rates"),
        *("partial_rotary_factor", "head_dim", "compress_ratios"),
    ],
)
def test_nonsense_is_refused_by_name(key, value):
    with pytest.raises(DataError, match=rf"config\.json: .*({key}|head_dim|layer_types)"):
        read({**OFFICIAL, key: value})
