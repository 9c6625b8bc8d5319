"""Spoiled GGUF files: each is refused with one line, or read as the sound one."""

import hashlib

import gguf
import make_gguf
import mutants
import numpy as np
import pytest
from bounds import bounded

from ds4mlx import DataError, load
from ds4mlx.cli.main import run as command
from ds4mlx.convert import convert, read_gguf
from ds4mlx.convert.plan import Plan
from ds4mlx.weights.inventory import experts


@pytest.fixture(scope="module")
def sound(small_source, tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.gguf"
    make_gguf.Written(small_source).main(path)
    reader = gguf.GGUFReader(path)
    return mutants.Sound(path.read_bytes(), reader.data_offset)


@pytest.fixture(scope="module")
def values(sound, tmp_path_factory):
    path = tmp_path_factory.mktemp("values") / "sound.gguf"
    path.write_bytes(sound.raw)
    return read_all(path)


def read_all(path) -> dict[str, str]:
    """What a conversion would read: a digest of every entry's planes."""
    source, found = read_gguf(path), {}
    for out in Plan(source, None, None).entries:
        digest, rows = hashlib.sha256(), out.rows // experts(out.entry)
        for expert in range(experts(out.entry)):
            for plane, array in source.stored(out.entry, expert, 0, rows).items():
                digest.update(plane.encode() + array.tobytes())
        found[out.entry.name] = digest.hexdigest()
    return found


def outcome(path, values) -> str:
    """ "read" or "refused"; asserts that it is one of them."""
    try:
        with bounded():
            found = read_all(path)
    except DataError as error:
        text = str(error)
        assert path.name in text and "\n" not in text and len(text) < 600
        assert text.isprintable()
        return "refused"
    assert changed(found, values) <= 1  # another type of the same size is another reading
    return "read"


def changed(found, values) -> int:
    assert set(found) == set(values)
    return sum(found[name] != values[name] for name in values)


def test_every_mutant_of_the_header(sound, values, tmp_path):
    """Several hundred; a few are harmless, such as a changed letter of a token."""
    found = {"read": 0, "refused": 0}
    for number, (what, raw) in enumerate(mutants.all_mutants(sound)):
        path = tmp_path / f"mutant{number}.gguf"
        path.write_bytes(raw)
        try:
            found[outcome(path, values)] += 1
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        path.unlink()
    assert found["refused"] > 600 and found["read"] < 200


@pytest.mark.parametrize("text", ["", "hi", "a text and no weights"])
def test_a_text_is_no_gguf_file(tmp_path, text):
    (tmp_path / "text").write_text(text)
    with pytest.raises(DataError, match="text: not a GGUF file"):
        read_gguf(str(tmp_path / "text"))


def test_flipped_bits_of_data(sound, values, tmp_path):
    """Change the values of one tensor, or are refused as not finite; no other tensor changes."""
    rng, path = np.random.default_rng(1), tmp_path / "mutant.gguf"
    for place in rng.integers(sound.data_start, len(sound.raw), 40):
        raw = bytearray(sound.raw)
        raw[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
        try:
            found = read_all(path)
        except DataError as error:
            assert "mutant.gguf: tensor" in str(error)
            continue
        assert changed(found, values) <= 1


def test_the_command_line_says_one_line(sound, tmp_path, capsys):
    """And leaves nothing behind."""
    chosen = mutants.all_mutants(sound, 5)[::25]
    for number, (what, raw) in enumerate(chosen):
        path, target = tmp_path / f"{number}.gguf", tmp_path / f"dir{number}"
        path.write_bytes(raw)
        code = command(["convert", str(path), str(target)])
        lines = capsys.readouterr().err.splitlines()
        assert code in (0, 1), what
        if code == 1:
            assert len(lines) == 1 and lines[0].startswith("error: "), what
            assert not target.exists(), what
    assert len(chosen) > 20


def test_damage_behind_the_header_leaves_no_model(sound, tmp_path):
    """Found while writing: a scale that is not finite."""
    path = tmp_path / "bad.gguf"
    raw = bytearray(sound.raw)
    reader = gguf.GGUFReader(write(path, sound.raw))
    tensor = next(t for t in reader.tensors if t.name == "blk.2.attn_kv.weight")
    raw[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7e"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"bad\.gguf: tensor blk\.2\.attn_kv\.weight holds"):
        convert(path, tmp_path / "dir", progress=False)
    with pytest.raises(DataError, match="not finished"):
        load(tmp_path / "dir")


def write(path, raw):
    path.write_bytes(raw)
    return path
