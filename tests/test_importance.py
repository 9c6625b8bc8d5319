"""Importance files: the legacy form and llama.cpp's GGUF form, sound and spoiled."""

import struct

import gguf
import numpy as np
import pytest
from bounds import bounded

from ds4mlx import DataError
from ds4mlx.convert.importance import Importance, write_gguf
from ds4mlx.weights.inventory import Entry

STACK = "blk.3.ffn_down_exps.weight"
ENTRY = Entry("layers.3.ffn.experts.w2.weight", (2, 8, 4), "experts")
VALUES = np.arange(1, 9, dtype=np.float32)


def record(name: str, calls: int, values, count: int | None = None) -> bytes:
    values = np.asarray(values, "<f4")
    count = len(values) if count is None else count
    head = struct.pack("<i", len(name.encode())) + name.encode()
    return head + struct.pack("<ii", calls, count) + values.tobytes()


def legacy(*records: bytes, trailer: bytes = struct.pack("<ii", 7, 4) + b"path") -> bytes:
    return struct.pack("<i", len(records)) + b"".join(records) + trailer


def written(path, raw: bytes):
    path.write_bytes(raw)
    return path


def gguf_file(path, arrays) -> bytes:
    write_gguf(path, arrays, "prompts.txt", 3, 512, "run")
    return path.read_bytes()


def values_of(importance: Importance) -> np.ndarray:
    importance.check([ENTRY])
    return np.stack([importance.of(ENTRY, expert) for expert in range(2)])


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_the_legacy_form(tmp_path, calls):
    """Values are divided by the calls; other names than the routed experts' are passed over."""
    raw = legacy(record("output.weight", 1, [9]), record(STACK, calls, VALUES))
    found = Importance.read(written(tmp_path / "im.dat", raw))
    assert np.array_equal(values_of(found), VALUES.reshape(2, 4) / max(calls, 1))
    assert list(found.stacks) == [STACK] and found.name == "im.dat"


def test_one_row_for_all_experts(tmp_path):
    raw = legacy(record(STACK, 1, VALUES[:4]))
    found = Importance.read(written(tmp_path / "im.dat", raw))
    assert np.array_equal(values_of(found), np.stack([VALUES[:4]] * 2))


def test_the_gguf_form(tmp_path):
    """Sums over counts; an expert that no token reached is even."""
    sums, counts = VALUES.reshape(2, 4), np.array([[4.0], [0.0]])
    arrays = {f"{STACK}.in_sum2": sums, f"{STACK}.counts": counts}
    gguf_file(tmp_path / "im.gguf", arrays)
    got = values_of(Importance.read(tmp_path / "im.gguf"))
    assert np.array_equal(got, [VALUES[:4] / 4, np.ones(4)])


def test_the_mtp_block_has_none(tmp_path):
    found = Importance.read(written(tmp_path / "im.dat", legacy(record(STACK, 1, VALUES))))
    mtp = Entry("mtp.0.ffn.experts.w2.weight", (2, 8, 4), "experts")
    found.check([mtp])
    assert found.of(mtp, 0) is None


def no_counts(path):
    return gguf_file(path, {f"{STACK}.in_sum2": VALUES.reshape(2, 4)})


def counts_of_others(path):
    sums, counts = VALUES.reshape(2, 4), np.ones((3, 1), np.float32)
    return gguf_file(path, {f"{STACK}.in_sum2": sums, f"{STACK}.counts": counts})


def spoiled_counts(count):
    """A file in which one expert met so many tokens."""
    counts = np.array([[4.0], [count]], np.float32)
    arrays = {f"{STACK}.in_sum2": VALUES.reshape(2, 4), f"{STACK}.counts": counts}
    return lambda path: gguf_file(path, arrays)


def another_kind(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


BAD = {
    "no importance of routed experts": lambda p: legacy(record("output.weight", 1, [1])),
    "not an imatrix file, or truncated": lambda p: b"",
    "a name of 0 bytes": lambda p: legacy(record("", 1, [1])),
    "a name of -1 bytes": lambda p: struct.pack("<ii", 1, -1) + bytes(40),
    f"{STACK} has -3 values": lambda p: legacy(record(STACK, 1, VALUES, -3)),
    "or truncated: buffer": lambda p: legacy(record(STACK, 1, VALUES, 2**31 - 1)),
    "negative or not finite": lambda p: legacy(record(STACK, 1, [-1.0] * 8)),
    "are negative or not finite": lambda p: legacy(record(STACK, 1, [np.nan] * 8)),
    f"tensor {STACK}.counts is missing": no_counts,
    f"{STACK} has 3 counts for 2 sums": counts_of_others,
    "has 8 values of -1 calls": lambda p: legacy(record(STACK, -1, VALUES)),
    f"{STACK} has counts that are negative": spoiled_counts(-1.0),
    "counts that are negative or not finite": spoiled_counts(np.nan),
    "has counts that are negative or not finite": spoiled_counts(np.inf),
    "is a GGUF file, but no imatrix": another_kind,
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused(tmp_path, message):
    path = written(tmp_path / "im", BAD[message](tmp_path / "im"))
    with pytest.raises(DataError, match=message) as refused:
        Importance.read(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("values", [VALUES[:7], VALUES[:5]])
def test_another_width(tmp_path, values):
    found = Importance.read(written(tmp_path / "im.dat", legacy(record(STACK, 1, values))))
    with pytest.raises(DataError, match=rf"im\.dat: {STACK} has {len(values)} values, expected 2"):
        found.check([ENTRY])


def test_a_layer_that_is_missing(tmp_path):
    raw = legacy(record("blk.0.ffn_up_exps.weight", 1, VALUES))
    with pytest.raises(DataError, match=rf"im\.dat: has no importance of {STACK}"):
        Importance.read(written(tmp_path / "im.dat", raw)).check([ENTRY])


def spoiled(raw: bytes, rng: np.random.Generator):
    """Cuts, flipped bits, and numbers replaced by huge ones."""
    for end in rng.integers(0, len(raw), 25):
        yield raw[:end]
    for place in rng.integers(0, len(raw), 40):
        changed = bytearray(raw)
        changed[place] ^= 1 << int(rng.integers(8))
        yield bytes(changed)
    for place in rng.integers(0, len(raw) - 8, 25):
        for value in (2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1):
            yield raw[:place] + struct.pack("<Q", value) + raw[place + 8 :]


@pytest.mark.parametrize("form", ["legacy", "gguf"])
def test_spoiled_files(tmp_path, form):
    """Refused with one line naming the file, or read with as many values as before."""
    path, sums = tmp_path / "im", VALUES.reshape(2, 4)
    arrays = {f"{STACK}.in_sum2": sums, f"{STACK}.counts": np.ones((2, 1))}
    sound = legacy(record(STACK, 1, VALUES)) if form == "legacy" else gguf_file(path, arrays)
    refused = 0
    for raw in spoiled(sound, np.random.default_rng(0)):
        path.write_bytes(raw)
        try:
            with bounded():
                assert values_of(Importance.read(path)).shape == (2, 4)
        except DataError as error:
            refused += 1
            assert "im" in str(error) and "\n" not in str(error)
    assert refused > 60
