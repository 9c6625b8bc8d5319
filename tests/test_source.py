"""Sources that are not as they must be: each is refused with one line that names the cause."""

import json

import numpy as np
import official
import pytest
import v4format

from ds4mlx import DataError
from ds4mlx.cli.main import run
from ds4mlx.convert import convert
from ds4mlx.engine.default_model import EMBEDDED

FP8 = "layers.0.attn.wq_a.weight"
FP4 = "layers.1.ffn.experts.2.w3.weight"
TABLE = "layers.0.ffn.gate.tid2eid"


def truncate(source):
    file = official.shard(source, FP8)
    file.write_bytes(file.read_bytes()[:-7])
    return file.name, "truncated"


def truncate_in_header(source):
    file = official.shard(source, FP8)
    file.write_bytes(file.read_bytes()[:300])
    return file.name, "truncated inside its header"


def empty_shard(source):
    file = official.shard(source, FP8)
    file.write_bytes(b"")
    return file.name, "not a safetensors file"


def bytes_after_the_end(source):
    file = official.shard(source, FP8)
    file.write_bytes(file.read_bytes() + b"\0")
    return file.name, "longer than its header says"


def not_a_safetensors_file(source):
    file = official.shard(source, FP8)
    file.write_bytes(b"<html>" * 1000)
    return file.name, "not a safetensors file"


def header(source, function):
    """Rewrite the header of a shard."""
    file = official.shard(source, FP8)
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text = function(json.loads(raw[8 : 8 + size]))
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return file.name


def header_is_no_json(source):
    return header(source, lambda h: json.dumps(h).encode()[:-1]), "header is not valid JSON"


def header_names_a_tensor_twice(source):
    def twice(h):
        text = json.dumps(h)
        return (text[:-1] + f', "{FP8}": {json.dumps(h[FP8])}}}').encode()

    return header(source, twice), "occurs twice"


def header_with_overlapping_tensors(source):
    def overlap(h):
        names = [n for n in h if n != "__metadata__"]
        a, b = h[names[0]]["data_offsets"]
        h[names[0]]["data_offsets"] = [a + 1, b + 1]
        return json.dumps(h).encode()

    return header(source, overlap), "overlaps another or leaves a gap"


def header_with_an_odd_size(source):
    def grow(h):
        h[FP8]["shape"][0] += 1
        return json.dumps(h).encode()

    return header(source, grow), FP8, "bytes for F8_E4M3"


def header_entry_malformed(source):
    def spoil(h):
        h[FP8] = {"dtype": "F8_E4M3", "shape": [-1, 4]}
        return json.dumps(h).encode()

    return header(source, spoil), FP8, "malformed"


def unknown_type(source):
    def spoil(h):
        h[FP8]["dtype"] = "F8_E9M9"
        return json.dumps(h).encode()

    return header(source, spoil), FP8, "unknown type 'F8_E9M9'"


def wrong_type(source):
    official.change(source, FP8, lambda t: ("F16", np.zeros(t[1].shape, np.float16)))
    return FP8, "has type F16, expected F8_E4M3"


def wrong_scale_type(source):
    scale = FP8.replace("weight", "scale")
    official.change(source, scale, lambda t: ("F32", np.ones(t[1].shape, np.float32)))
    return scale, "has type F32, expected F8_E8M0"


def experts_of_two_types(source):
    official.change(source, FP4, lambda t: ("BF16", np.zeros((128, 128), np.uint16)))
    official.change(source, FP4.replace("weight", "scale"), lambda t: None)
    return "layers.1.ffn.experts.*.w3.weight", "several types"


def missing_tensor(source):
    official.change(source, FP4, lambda t: None)
    return FP4, "missing"


def missing_scale(source):
    scale = FP8.replace("weight", "scale")
    official.change(source, scale, lambda t: None)
    return scale, "missing"


def scale_without_codes(source):
    official.add(source, "head.scale", ("F8_E8M0", np.full((3, 1), 127, np.uint8)))
    return "head.scale", "no codes"


def wrong_shape(source):
    official.change(source, "layers.1.attn_norm.weight", lambda t: (t[0], t[1][:-1]))
    return "layers.1.attn_norm.weight", "shape [127], expected [128]"


def wrong_scale_shape(source):
    scale = FP4.replace("weight", "scale")
    official.change(source, scale, lambda t: (t[0], t[1][:, :-1]))
    return scale, "shape [128, 3], expected [128, 4]"


def transposed(source):
    name = "layers.0.hc_attn_fn"
    official.change(source, name, lambda t: (t[0], t[1].T))
    return name, "has shape [512, 24], expected [24, 512]"


def unknown_tensor(source):
    official.add(source, "layers.0.engram.weight", ("BF16", np.zeros(4, np.uint16)))
    return "layers.0.engram.weight", "unsupported tensor"


def tokenizer_is_none(source):
    (source / "tokenizer.json").write_text("{}")
    return "tokenizer.json", "not a tokenizer"


def index_is_no_json(source):
    (source / official.INDEX).write_text('{"weight_map": {')
    return official.INDEX, "not valid JSON"


def index_without_a_map(source):
    (source / official.INDEX).write_text('{"weight_map": 5}')
    return official.INDEX, "weight_map"


def index_names_a_missing_shard(source):
    file = official.shard(source, FP8)
    file.unlink()
    return official.INDEX, file.name, "missing"


def index_leaves_the_directory(source):
    official.edit_index(source, lambda names: names.update({FP8: "../../etc/passwd"}))
    return official.INDEX, "weight_map"


def index_forgets_a_tensor(source):
    official.edit_index(source, lambda names: names.pop(FP8))
    return FP8, "not listed"


def index_points_to_the_wrong_shard(source):
    wrong = official.shard(source, FP4).name
    official.edit_index(source, lambda names: names.update({FP8: wrong}))
    return FP8, "not listed there"


def index_names_a_tensor_that_is_nowhere(source):
    file = official.shard(source, FP8).name
    official.edit_index(source, lambda names: names.update({"layers.0.more": file}))
    return file, "layers.0.more", "missing"


def no_weights_at_all(source):
    for file in source.glob("model*"):
        file.unlink()
    return official.INDEX, "neither"


def no_config(source):
    (source / "config.json").unlink()
    return "config.json", "no such file"


def config_is_no_json(source):
    (source / "config.json").write_text("{'model_type': 1}")
    return "config.json", "not valid JSON"


def config_is_no_object(source):
    (source / "config.json").write_text("[1]")
    return "config.json", "object"


def setting(key, value, *causes):
    """A spoiler that sets one key of config.json."""

    def spoil(source):
        official.edit_config(source, **{key: value})
        return "config.json", *causes

    spoil.__name__ = f"{key}_{value}".replace(" ", "")
    return spoil


def codes(name, value, at=-1):
    """A spoiler that puts one stored element in a tensor."""

    def put(tensor):
        dtype, array = tensor
        array = array.copy()
        array.reshape(-1)[at] = value
        return dtype, array

    def spoil(source):
        official.change(source, name, put)
        return name, official.shard(source, name).name

    spoil.__name__ = f"{name}_holds_{value}"
    return spoil


def expert_named_twice(source):
    official.change(source, TABLE, lambda t: (t[0], np.zeros_like(t[1])))
    return TABLE, "names an expert twice"


NAN_BF16 = 0x7FC0
SPOILERS = [
    *(truncate, truncate_in_header, empty_shard, bytes_after_the_end, not_a_safetensors_file),
    *(header_is_no_json, header_names_a_tensor_twice, header_with_overlapping_tensors),
    *(header_with_an_odd_size, header_entry_malformed, unknown_type),
    *(wrong_type, wrong_scale_type, experts_of_two_types, missing_tensor, missing_scale),
    *(scale_without_codes, wrong_shape, wrong_scale_shape, transposed, unknown_tensor),
    *(tokenizer_is_none, index_is_no_json, index_without_a_map, index_names_a_missing_shard),
    *(index_leaves_the_directory, index_forgets_a_tensor, index_points_to_the_wrong_shard),
    *(index_names_a_tensor_that_is_nowhere, no_weights_at_all),
    *(no_config, config_is_no_json, config_is_no_object, expert_named_twice),
    setting("hidden_size", 130, "hidden_size", "multiple of 32", "130"),
    setting("hidden_size", -128, "hidden_size"),
    setting("hidden_size", "128", "hidden_size"),
    setting("hidden_size", None, "missing hidden_size"),
    setting("vocab_size", 10**12, "vocab_size"),
    setting("num_experts_per_tok", 5, "num_experts_per_tok 5 is above n_routed_experts 4"),
    setting("o_groups", 3, "o_groups 3 must divide"),
    setting("compress_ratios", [0, 4, 128, 0, 0, 0], "compress_ratios has 6 entries"),
    setting("compress_ratios", [0, 4, 64, 0], "compress_ratios"),
    setting("index_head_dim", 96, "index_head_dim"),
    setting("rms_norm_eps", -1.0, "rms_norm_eps"),
    setting("rms_norm_eps", float("nan"), "rms_norm_eps"),
    setting("rope_theta", float("inf"), "rope_theta"),
    setting("rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling.type"),
    setting("scoring_func", "softmax", "scoring_func"),
    setting("norm_topk_prob", False, "norm_topk_prob"),
    setting("topk_method", "greedy", "topk_method"),
    setting("hidden_act", "gelu", "hidden_act"),
    setting("eos_token_id", 288, "eos_token_id"),
    setting("model_type", "deepseek_v32", "deepseek_v32", "not supported"),
    setting("model_type", None, "None", "not supported"),
    setting("engram_layers", [1], "engram", "V4.1"),
    setting("vision_config", {}, "vision"),
    setting("quantization_config", {"weight_block_size": [64, 64]}, "[64, 64] is not supported"),
    codes(FP8.replace("weight", "scale"), 255),
    codes(FP4.replace("weight", "scale"), 255, 0),
    codes(FP8, 0xFF),
    codes(FP8, 0x7F, 0),
    codes("embed.weight", NAN_BF16),
    codes("layers.0.hc_attn_fn", np.inf),
    codes(TABLE, 4),
    codes(TABLE, -1),
]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda s: s.__name__)
def test_one_clear_line_and_exit_code_1(small_source, tmp_path, capsys, spoil):
    source = official.copy(small_source, tmp_path / "source")
    causes = spoil(source)
    assert run(["convert", str(source), str(tmp_path / "out")]) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if "writing" not in x]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for cause in causes:
        assert cause in lines[0]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_every_byte_of_a_header_matters_or_is_refused(small_source, tmp_path):
    """Random damage to a header never gives anything but the right result or a DataError."""
    rng = np.random.default_rng(1)
    source = official.copy(small_source, tmp_path / "source")
    file = official.shard(source, "norm.weight")
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    for place in rng.integers(0, 8 + size, 300):
        raw = bytearray(whole)
        raw[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(raw)
        try:
            convert(source, tmp_path / "out", dry_run=True, progress=False)
        except DataError:
            continue
        assert v4format.read_safetensors(file).keys() == {
            name for name, s in official.weight_map(source).items() if s == file.name
        }


@pytest.mark.parametrize("location", ["nowhere", "/no/where", "./a/b", "a/b/c", "~/none-such"])
def test_a_directory_that_is_not_there(location, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", location]) == 1
    assert "no such directory" in capsys.readouterr().err


def test_memory_at_an_asked_context(capsys):
    assert run(["inspect", str(EMBEDDED), "--ctx", "1234", "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["state_bytes"]
    assert list(sizes) == ["1234"] and sizes["1234"] > 0


def test_an_unfinished_directory_is_called_so(tmp_path, capsys):
    (tmp_path / "convert-journal.jsonl").write_text("")
    assert run(["inspect", str(tmp_path)]) == 1
    assert "its conversion is not finished" in capsys.readouterr().err
