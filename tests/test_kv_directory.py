"""What a KV store may touch: its own sound files are kept, its damaged ones go, others' stay."""

import json
import zlib

import numpy as np
import pytest

from ds4mlx import DataError, KVStore
from ds4mlx.bench.synthetic_state import same_state, synthetic_state
from ds4mlx.store import admin, block_file
from ds4mlx.store.directory import MARK
from ds4mlx.store.journal import Journal

IDS = np.random.default_rng(0).integers(0, 512, 700)


@pytest.fixture
def filled(bare_model, tmp_path):
    """A directory with a store of two prefixes."""
    path = tmp_path / "kv"
    with KVStore(path, model=bare_model) as store:
        for end in (300, 700):
            store.save(IDS[:end], synthetic_state(bare_model, IDS[:end]))
    return path


def entries(path, change):
    """Rewrite the index with every entry changed, each line with its right checksum."""
    lines = [json.loads(line.partition(" ")[2]) for line in path.read_text().split("\n") if line]
    texts = [json.dumps(change(line)).encode() for line in lines]
    path.write_bytes(b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts))


def whole(model, path, ids=IDS):
    """Asserts that everything is found, and nothing set apart."""
    with KVStore(path, model=model) as store:
        for end in (300, 700):
            state, count = store.restore(ids[:end])
            assert count == end and same_state(state, synthetic_state(model, ids[:end]))
    assert not list((path / "damaged").iterdir())
    assert admin.check(admin.open_directory(path)) == []


def added(**more):
    return lambda line: {"add": {**line["add"], **more}} if "add" in line else line


def without(name):
    return lambda line: {"add": {key: value for key, value in line["add"].items() if key != name}}


@pytest.mark.parametrize(
    "change",
    [
        added(colour="blue"),
        added(start="0", tokens="700"),
        added(end=5, tokens=5),
        added(prefix="0" * 40, created="yesterday"),
        added(key="0" * 40),
        added(parent="f" * 40, segment="f" * 40),
        without("label"),
        without("key"),
        without("prefix"),
        lambda line: {"add": 3},
        lambda line: {"hit": line["add"]["key"]},
        lambda line: {"use": [], "value": None},
        lambda line: {"news": line},
    ],
)
def test_an_index_of_another_version_moves_no_sound_file(bare_model, filled, change):
    entries(filled / "index.jsonl", change)
    whole(bare_model, filled)


def rewritten(path, change):
    """Write a store's file anew with another description, its checksums right."""
    with block_file.opened(path) as fd:
        header = block_file.read_header(fd, path)
        blocks = [bytearray(size) for size in header.sizes]
        block_file.read_blocks(fd, path, header, map(memoryview, blocks))
    block_file.write(path, change(header.meta), [memoryview(block) for block in blocks])


@pytest.mark.parametrize("change", [{"colour": "blue"}, {"label": "another"}, {"created": 1}])
def test_headers_of_a_later_version_are_read(bare_model, filled, change):
    (filled / "index.jsonl").unlink()
    for path in filled.rglob("*.kv"):
        rewritten(path, lambda meta: {**meta, **change})
    whole(bare_model, filled)


@pytest.mark.parametrize("name", ["reason", "text", "text_bytes", "created"])
def test_headers_of_an_earlier_version_are_read(bare_model, filled, name):
    (filled / "index.jsonl").unlink()
    for path in (filled / "records").iterdir():
        rewritten(path, lambda meta: {k: v for k, v in meta.items() if k != name})
    whole(bare_model, filled)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: rewritten(path, lambda meta: {"kind": "new"}),
        lambda path: rewritten(path, lambda meta: {**meta, "key": "0" * 40}),
        lambda path: path.write_bytes(b"DS4MLXK2" + path.read_bytes()[8:]),
    ],
)
def test_what_cannot_be_told_to_be_damaged_stays_and_is_not_used(bare_model, filled, spoil):
    paths = list((filled / "records").iterdir())
    for path in paths:
        spoil(path)
    (filled / "index.jsonl").unlink()
    assert KVStore(filled, model=bare_model).restore(IDS)[1] == 0
    admin.prune(admin.open_directory(filled), None, None)
    assert all(path.exists() for path in paths)


def test_prune_leaves_nothing_that_verify_reports(bare_model, filled):
    for place, path in enumerate(sorted(filled.rglob("*.kv"))):
        raw = bytearray(path.read_bytes())
        raw[20 if place % 2 else -1] ^= 1
        path.write_bytes(raw)
    assert admin.check(admin.open_directory(filled))
    admin.prune(admin.open_directory(filled), None, None)
    assert admin.check(admin.open_directory(filled)) == []
    assert not list(filled.rglob("*.kv"))


# Others' files


def foreign(root):
    names = ("notes.txt", "x.tmp", "segments/a.kv", "records/b.tmp", "damaged/c", "index.json")
    for name in names:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(name)
    return sorted(root / name for name in names)


def test_clear_takes_the_stores_own_files_only(bare_model, filled):
    paths = foreign(filled)
    with KVStore(filled, model=bare_model) as store:
        assert store.restore(IDS)[1] == 700
        store.save(IDS[:500], synthetic_state(bare_model, IDS[:500]))
    freed, others = admin.clear(filled)
    assert freed > 0 and sorted(others) == paths
    assert all(path.read_text() == str(path.relative_to(filled)) for path in paths)
    with KVStore(filled, model=bare_model) as store:
        assert store.restore(IDS)[1] == 0 and store.nbytes == 0


def test_a_directory_without_the_mark_is_touched_by_nothing(bare_model, tmp_path):
    paths = foreign(tmp_path)
    for attempt in (
        lambda: admin.clear(tmp_path),
        lambda: admin.open_directory(tmp_path),
        lambda: KVStore(tmp_path, model=bare_model),
    ):
        with pytest.raises(DataError):
            attempt()
    assert all(path.read_text() == str(path.relative_to(tmp_path)) for path in paths)
    assert not (tmp_path / MARK).exists()


def test_what_is_no_directory_is_called_so(bare_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file: is not a directory"):
        KVStore(tmp_path / "file", model=bare_model)
    for attempt in (admin.open_directory, admin.clear):
        with pytest.raises(DataError, match="none: no such directory"):
            attempt(tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_sound_file_that_took_the_place_of_a_damaged_one_stays(bare_model, filled):
    """As when another process saves it anew between the reading and the setting apart."""
    catalogue = admin.open_directory(filled)
    path = next(iter((filled / "segments").iterdir()))
    catalogue.set_apart(path, block_file.DamagedFile(path, "was damaged"))
    assert path.exists()
    whole(bare_model, filled)


# The journal


def test_a_journal_that_was_replaced_twice_is_read_anew(tmp_path):
    """Whatever number the system gives its file: it may be the first one's again."""
    writer, reader = Journal(tmp_path / "j"), Journal(tmp_path / "j")
    writer.append([{"n": 1}, {"n": 2}])
    assert [entry["n"] for entry in reader.news()[0]] == [1, 2]
    inode = (tmp_path / "j").stat().st_ino
    with writer.still():
        writer.replace([{"n": 3}, {"n": 4}, {"n": 5}])
    content = (tmp_path / "j").read_bytes()
    (tmp_path / "j").unlink()
    (tmp_path / "j").write_bytes(content)
    found, anew = reader.news()
    assert [entry["n"] for entry in found if "n" in entry] == [3, 4, 5] and anew, inode
    writer.append([{"n": 6}])
    assert reader.news() == ([{"n": 6}], False)


# Token ids


@pytest.mark.parametrize(
    "wrong",
    [
        [-1], [2**31], [2**40], [2**64], [2**70], [1.0], [1.5], [True], ["a"], [None], "text",
        [[1, 2], [3, 4]], [[1], [2, 3]], 5, None, np.array([0.0]), np.array([2**63], np.uint64),
        np.array([-5], np.int8), np.zeros((2, 3), int),
    ],
)  # fmt: skip
def test_what_is_no_sequence_of_token_ids_is_refused(bare_model, tmp_path, wrong):
    store = KVStore(tmp_path, model=bare_model)
    zeros = synthetic_state(bare_model, np.zeros(9, int))
    store.save([0], zeros)
    for call in (lambda: store.save(wrong, zeros), lambda: store.restore(wrong)):
        with pytest.raises(DataError):
            call()
    with pytest.raises(DataError, match="no token id of a vocabulary of 512"):
        store.save([512], zeros)
    assert store.restore([0, 512])[1] == 1


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint64, list, tuple])
def test_token_ids_of_any_integer_type(bare_model, tmp_path, kind):
    store = KVStore(tmp_path, model=bare_model)
    ids = [0, 1, 2, 3]
    given = kind(ids) if kind in (list, tuple) else np.array(ids, kind)
    store.save(given, synthetic_state(bare_model, np.array(ids)))
    assert store.restore(given)[1] == 4
