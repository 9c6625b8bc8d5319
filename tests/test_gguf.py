"""GGUF files as sources: files of ds4's and llama.cpp's kinds, split ones, MTP files, refusals."""

import json
import re
import shutil

import gguf
import make_gguf
import mlx.core as mx
import numpy as np
import official
import pytest
import v4format
from gguf import GGMLQuantizationType as Type
from reference import DATA, run, run_chunks, settle_ties
from refmodel import RefModel

from ds4mlx import DataError, load
from ds4mlx.cli.main import run as command
from ds4mlx.convert import convert, inspect, read_gguf, verify
from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.weights.directory import MANIFEST, ModelDirectory

DS4_Q2 = DATA / "gguf" / "ds4-q2.gguf"


@pytest.fixture(scope="module")
def files(talker_source, tmp_path_factory):
    """The random checkpoint in both dialects, its MTP block in files of their own."""
    path, written = tmp_path_factory.mktemp("gguf"), {}
    for dialect in make_gguf.DIALECTS:
        written[dialect] = make_gguf.Written(talker_source, dialect)
        written[dialect].main(path / f"{dialect}.gguf")
        written[dialect].mtp(path / f"{dialect}-mtp.gguf")
    return path, written


@pytest.fixture(scope="module")
def q2_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("ds4") / "q2"
    convert(DS4_Q2, path, progress=False)
    return path


def rows_apart(got, want):
    """Largest difference of every row."""
    return np.abs(got - want).max(-1)


@pytest.mark.parametrize("lengths", [[], [1] * 60 + [97, 1, 1, 128, 1], [150, 1, 1, 1]])
def test_logits_of_llama_cpp(q2_dir, lengths):
    """On a file by ds4's own quantiser: IQ2_XXS, Q2_K, Q8_0, F16; in one piece and in many."""
    stored = v4format.read_safetensors(DATA / "gguf" / "ds4-q2.logits.safetensors")
    ids, want = stored["tokens"][1], stored["logits"][1]
    model, _ = load(q2_dir, mx.float32, "none")
    settle_ties(model)
    got = run_chunks(model, ids, lengths)
    apart = rows_apart(got, want)
    assert np.median(apart) <= 5e-4 and (apart <= 2e-3).mean() >= 0.98
    assert apart.max() <= 1e-4  # on exactly these values nothing else is left
    assert (got.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.parametrize("dialect", make_gguf.DIALECTS)
def test_logits_of_both_dialects(files, talker_source, tmp_path, dialect):
    """Against the float64 model with the values that gguf-py reads in the files."""
    path, written = files
    convert(path / f"{dialect}.gguf", tmp_path, progress=False)
    reference = RefModel(str(talker_source), angle_dtype=np.float32)
    reference.w |= {name: value.astype(float) for name, value in floats(written[dialect]).items()}
    ids = np.random.default_rng(0).integers(3, 700, 130)  # more rows than it selects tie at zero
    want = reference.forward(ids)[0]
    assert np.abs(run(load(tmp_path, mx.float32, "none")[0], ids) - want).max() <= 1e-4


def floats(written):
    return {n: v for n, v in written.values.items() if v.dtype == np.float32}


@pytest.mark.parametrize("dialect", make_gguf.DIALECTS)
def test_an_mtp_file_beside(files, tmp_path, dialect):
    """Every value of the MTP block, and of the main model, is the one in the files."""
    path, written = files
    main, mtp = path / f"{dialect}.gguf", path / f"{dialect}-mtp.gguf"
    convert(main, tmp_path, mtp=mtp, progress=False)
    model, _ = load(tmp_path, mx.float32, "none")
    source, found = read_gguf(main, mtp), 0
    inventory = ModelDirectory.open(tmp_path).inventory.values()
    for entry in (entry for entries in inventory for entry in entries):
        for e in range(entry.shape[0] if entry.kind == "experts" else 1):
            rows = entry.shape[-2] if entry.kind == "experts" else entry.shape[0]
            want = written[dialect].values[entry.official(e)]
            assert np.array_equal(source.values(entry, e, 0, rows), want), entry.name
            found += entry.name.startswith("mtp.")
    assert found > 30 and len(model.mtp) == 1


def test_verify_against_a_file_and_its_mtp_file(files, tmp_path, capsys):
    main, mtp, out = *(str(files[0] / f"ds4{x}.gguf") for x in ("", "-mtp")), str(tmp_path / "out")
    assert command(["convert", main, out, "--mtp", mtp]) == 0
    assert command(["verify", out, "--against", main, "--mtp", mtp, "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("mtp.0." in line and line.endswith("error 0") for line in lines) > 30
    assert command(["verify", out, "--mtp", mtp]) == 2


def test_nothing_is_rounded(q2_dir):
    """verify reads both sides; and gguf-py agrees with what the directory holds."""
    checked = verify(q2_dir, DS4_Q2)
    assert len(checked) > 140 and all(each.error == 0 for each in checked)
    blocks = {t.name: t for t in gguf.GGUFReader(DS4_Q2).tensors}
    model, _ = load(q2_dir, mx.float32)
    for part, place in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        stored = blocks[f"blk.3.ffn_{place}_exps.weight"]
        want = gguf.quants.dequantize(stored.data, Type(stored.tensor_type))
        assert np.array_equal(np.array(model.layers[3].ffn.experts[part].decode()), want)


def test_a_flipped_byte_is_found(q2_dir, tmp_path):
    copy = shutil.copytree(q2_dir, tmp_path / "copy")
    file = copy / "layers.3.experts.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"layers\.3\."):
        verify(copy)


def test_split_files(files, tmp_path):
    """Any of the shards stands for all; the weights have the bytes that one file gives."""
    path, written = files
    written["mainline"].main(tmp_path / "model.gguf", split=40)
    shards = sorted(tmp_path.glob("*.gguf"))
    assert len(shards) == 4 and shards[0].name == "model-00001-of-00004.gguf"
    convert(path / "mainline.gguf", tmp_path / "whole", progress=False)
    want = official.digests(tmp_path / "whole")
    for number in (0, 2):
        convert(shards[number], tmp_path / f"from{number}", progress=False)
        got = official.digests(tmp_path / f"from{number}")
        assert {**got, MANIFEST: ""} == {**want, MANIFEST: ""}
    shards[1].unlink()
    with pytest.raises(DataError, match=r"model-00002-of-00004\.gguf: missing, one of 4 files"):
        convert(shards[0], tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("release", [None, "april", "0731"])
def test_the_release(files, tmp_path, release):
    convert(files[0] / "ds4.gguf", tmp_path, release=release, progress=False)
    assert ModelDirectory.open(tmp_path).config.release == (release or "april")


def renamed(target, path, change):
    """A copy of a GGUF file with some of its bytes replaced, of the same length."""
    old, new = change
    raw = path.read_bytes()
    assert len(old) == len(new) and raw.count(old) >= 1
    target.write_bytes(raw.replace(old, new, 1))
    return target


def typed(name, kind):
    """A tensor's header up to its type, and the same with another type."""
    reader = gguf.GGUFReader(DS4_Q2)
    tensor = next(t for t in reader.tensors if t.name == name)
    head = name.encode() + len(tensor.shape).to_bytes(4, "little") + tensor.shape.tobytes()
    old, new = (head + int(k).to_bytes(4, "little") for k in (tensor.tensor_type, kind))
    return old, new


# What is changed in the file -> what the refusal says.
REFUSED = {
    "architecture": (
        (b"\x09\0\0\0\0\0\0\0deepseek4", b"\x09\0\0\0\0\0\0\0deepseek2"),
        "architecture 'deepseek2' is not supported",
    ),
    "tensor": (
        (b"blk.1.attn_kv.weight", b"blk.1.attn_kx.weight"),
        "unsupported tensor blk.1.attn_kx",
    ),
    "layer": ((b"blk.4.attn_kv.weight", b"blk.9.attn_kv.weight"), "blk.9.attn_kv.weight"),
    "key": (
        (b"attention.q_lora_rank", b"attention.q_lora_rand"),
        "attention.q_lora_rank is missing",
    ),
    "Q5_1": (typed("blk.0.attn_kv.weight", Type.Q5_1), "blk.0.attn_kv.weight has type Q5_1"),
    "tokenizer": ((b"joyai-llm", b"joyai-lmm"), "tokenizer gpt2/joyai-lmm is not supported"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported(tmp_path, what):
    """Refused, naming the file, before anything is written."""
    change, message = REFUSED[what]
    bad = renamed(tmp_path / "bad.gguf", DS4_Q2, change)
    with pytest.raises(DataError, match=re.escape(message)) as refused:
        convert(bad, tmp_path / "dir", progress=False)
    assert "bad.gguf" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "dir").exists()


def test_every_tensor_of_an_unsupported_type_is_named(tmp_path):
    bad = tmp_path / "bad.gguf"
    shutil.copy(DS4_Q2, bad)
    for name in ("blk.0.attn_kv.weight", "blk.3.attn_q_b.weight"):
        renamed(bad, bad, typed(name, Type.Q5_1))
    with pytest.raises(DataError, match=r"blk\.0\.attn_kv\.weight.*blk\.3\.attn_q_b\.weight"):
        read_gguf(bad)


def test_an_mtp_file_alone(files):
    with pytest.raises(DataError, match="holds only an MTP block: give it with --mtp"):
        read_gguf(files[0] / "ds4-mtp.gguf")


def test_inspect(q2_dir, capsys):
    """A file and its conversion have the same sizes in every component, but for widened values."""
    found, converted = inspect(DS4_Q2, tensors=True), inspect(q2_dir)
    for what in ("routed experts", "attention", "shared experts", "embedding", "head"):
        assert found.bytes_by_component[what] == converted.bytes_by_component[what]
    formats = {t.name: t.format for t in found.tensors}
    assert formats["layers.3.ffn.experts.w1.weight"] == "IQ2_XXS"
    assert command(["inspect", str(DS4_Q2), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["hidden_size"] == 256


@pytest.mark.parametrize(
    ("source", "recipe", "offered"),
    [
        (DS4_Q2, "q2", "keep"),
        (DS4_Q2, "q2-auto --choice choice.json", "keep"),
        (EMBEDDED, "keep", "official, q2, q2-q4, q4, q2-auto, bf16, f32"),
    ],
)
def test_recipes_of_each_kind_of_source(tmp_path, capsys, source, recipe, offered):
    words = ["convert", str(source), str(tmp_path / "dir"), "--recipe", *recipe.split()]
    assert command(words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].endswith(offered)
    assert not (tmp_path / "dir").exists()
