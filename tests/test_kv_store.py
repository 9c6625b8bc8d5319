"""The KV store: what is restored is what was saved, in every byte, and continues as it would have."""

import hashlib
import os
import stat
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from reference import run

from ds4mlx import DataError, KVStore, RewindError, load
from ds4mlx.bench.synthetic_state import same_state, synthetic_state
from ds4mlx.state.boundaries import Spacing

IDS = np.random.default_rng(0).integers(0, 288, 4000)


@pytest.fixture
def store(small_model, tmp_path):
    with KVStore(tmp_path / "kv", budget_bytes=1 << 30, model=small_model) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain_model(small_dir):
    return load(small_dir, dtype=mx.float32, rounding="none")[0]


def fed(model, ids, cache=None):
    cache = model.make_cache() if cache is None else cache
    run(model, ids, cache)
    return cache


# Bit for bit


def lengths(dense, count):
    """Lengths of `count` chunks that end near multiples of 4, 128 and `dense`, here and there."""
    near = {4 * n + d for n in range(1, 25) for d in (-1, 0, 1)}
    near |= {128 * n + d for n in range(1, dense // 128) for d in (-3, -1, 0, 1, 4)}
    always = {1, 3, 4, 5, 127, 128, 129} | {dense + d for d in (-1, 0, 1, 4, 128)}
    rest = np.random.default_rng(1).permutation(sorted(near - always))[: count - len(always)]
    return np.diff([0, *sorted(always | set(rest.tolist()))]).tolist()


@pytest.mark.parametrize("rounding", ["official", "none"])
@pytest.mark.parametrize(
    ("dense", "count"), [(256, 24), pytest.param(2048, 102, marks=pytest.mark.slow)]
)
def test_a_restored_state_continues_in_every_bit_as_the_run_it_was_saved_from(
    request, rounding, dense, count, tmp_path
):
    """Prefixes with their continuations, the next chunk of the same run; with a boundary in it."""
    model = request.getfixturevalue("small_model" if rounding == "official" else "plain_model")
    store, cache, end, pairs = KVStore(tmp_path / "kv", model=model), model.make_cache(), 0, 0
    cache.boundaries.spacing = Spacing(dense, 8 * dense, 4 * dense)
    for length in lengths(dense, count):
        if end:
            store.save(IDS[:end], cache)
            restored, reached = store.restore(IDS[: end + length])
            assert reached == end == restored.offset
            assert same_state(restored, cache)
            assert restored.nbytes <= cache.nbytes
        want = run(model, IDS[end : end + length], cache)
        if end:
            assert np.array_equal(run(model, IDS[end : end + length], restored), want)
            pairs += 1
        end += length
    assert pairs == count - 1 and end == dense + 128 and dense in cache.records


def test_bfloat16_states_too(small_dir, tmp_path):
    for rounding in ("official", "none"):
        model = load(small_dir, rounding=rounding)[0]
        store, cache = KVStore(tmp_path / "kv", model=model), fed(model, IDS[:133])
        store.save(IDS[:133], cache)
        restored, count = store.restore(IDS)
        assert count == 133 and same_state(restored, cache)
        assert np.array_equal(run(model, IDS[133:137], restored), run(model, IDS[133:137], cache))


def test_branches_share_what_they_have_in_common(small_model, store):
    """And each is restored with its own rows."""
    cache = fed(small_model, IDS[:900])
    store.save(IDS[:896], cache)
    before = store.nbytes
    ends = {}
    for branch in range(3):
        ids = np.concatenate([IDS[:896], np.random.default_rng(branch).integers(0, 288, 50)])
        state, count = store.restore(ids)
        assert count == 896
        ends[branch] = (ids, fed(small_model, ids[896:], state))
        store.save(ids, state)
    assert store.nbytes < before + 3 * (50 * 1100 + 130_000)  # rows of 50 tokens, and a record
    for ids, state in ends.values():
        restored, count = store.restore(ids)
        assert count == 946 and same_state(restored, state)
    assert store.restore(np.concatenate([IDS[:900], [1, 2]]))[1] == 896


def test_a_state_that_was_rewound_and_went_elsewhere(small_model, store):
    cache = fed(small_model, IDS[:300])
    store.save(IDS[:300], cache)
    cache.rewind(250)
    other = np.concatenate([IDS[:250], IDS[1000:1100]])
    fed(small_model, other[250:], cache)
    store.save(other, cache)
    for ids, length in ((IDS, 300), (other, 350)):
        restored, count = store.restore(ids)
        assert count == length
        if ids is other:
            assert same_state(restored, cache)
            want = run(small_model, IDS[:9], cache)
            assert np.array_equal(run(small_model, IDS[:9], restored), want)


def test_a_state_saved_under_other_tokens_than_before_harms_nothing(bare_model, tmp_path):
    """A caller's mistake: what was saved rightly is still there."""
    store = KVStore(tmp_path, 1 << 30, bare_model, min_free_bytes=0)
    ids, other = (np.random.default_rng(n).integers(0, 512, 700) for n in (0, 1))
    state = synthetic_state(bare_model, ids)
    store.save(ids, state)
    for wrong in (other, np.concatenate([ids[:300], other[:400]])):
        store.save(wrong, state)
        assert store.restore(wrong)[1] == 700
    restored, count = store.restore(ids)
    assert count == 700 and same_state(restored, state)
    assert not list((tmp_path / "damaged").iterdir())


def test_two_runs_with_other_chunks_are_not_mixed(small_model, store):
    """Their rows may differ in the last bits: each is restored as it was, the later one first."""
    one, other = fed(small_model, IDS[:200]), small_model.make_cache()
    for at in range(0, 200, 50):
        fed(small_model, IDS[at : at + 50], other)
    for cache in (one, other, one):
        store.save(IDS[:200], cache)
        if cache is other:
            assert same_state(store.restore(IDS)[0], cache)
    assert same_state(store.restore(IDS[:200])[0], other) or same_state(one, other)


def test_equal_runs_are_stored_once(small_model, store):
    for _ in range(2):
        store.save(IDS[:700], fed(small_model, IDS[:700]))
        files = sorted(path.name for path in store.directory.rglob("*.kv"))
    assert len(files) == 2


def test_states_that_did_not_come_from_the_store_share_rows_too(bare_model, tmp_path):
    """If the rows are the same: with stored segments, whole or to the middle."""
    store = KVStore(tmp_path, 1 << 30, bare_model, min_free_bytes=0)
    base, rng = np.random.default_rng(0).integers(0, 512, 3000), np.random.default_rng(1)
    for cut, length in ((1000, 1000), (1000, 2000), (3000, 3000), (1501, 1900), (1501, 2500)):
        ids = np.concatenate([base[:cut], rng.integers(0, 512, length - cut)])
        state = synthetic_state(bare_model, ids)
        store.save(ids, state)
        restored, count = store.restore(ids)
        assert count == length and same_state(restored, state)
    catalogue = store._catalogue
    spans = sorted((s.start, s.end) for s in catalogue.segments.values())
    assert spans == [(0, 1000), (1000, 2000), (1000, 3000), (1501, 1900), (1501, 2500)]


def test_another_process_restores_the_same(small_dir, stored_model, store):
    cache = fed(stored_model, IDS[:331])
    store.save(IDS[:331], cache)
    want = run(stored_model, IDS[331:340], cache)
    script = """
import sys
from ds4mlx import KVStore, load  # which chooses the BLAS before MLX is loaded
import mlx.core as mx, numpy as np
model = load(sys.argv[1], dtype=mx.float32)[0]
ids = np.random.default_rng(0).integers(0, 288, 4000)
cache, count = KVStore(sys.argv[2], model=model).restore(ids)
assert count == 331
np.save(sys.argv[3], np.array(model(mx.array(ids[None, 331:340]), cache=cache))[0])
"""
    out = store.directory / "logits.npy"
    command = [sys.executable, "-c", script, str(small_dir), str(store.directory), str(out)]
    subprocess.run(command, check=True, timeout=60)
    assert np.array_equal(np.load(out), want)


# What is found


def test_one_save_stores_the_boundaries_that_were_set_aside(small_model, store):
    cache = small_model.make_cache()
    cache.boundaries.spacing = Spacing(256, 2048, 1024)
    fed(small_model, IDS[:1000], cache)
    store.save(IDS[:1000], cache)
    for shared, want in ((999, 768), (1000, 1000), (600, 512), (256, 256), (255, 0)):
        edited = np.concatenate([IDS[:shared], (IDS[shared : shared + 9] + 1) % 288])
        restored, count = store.restore(edited)
        assert count == want
        if count:
            probe = cache if count == 1000 else None
            assert probe is None or same_state(restored, probe)
    cache.rewind(512)
    assert same_state(store.restore(IDS[:600])[0], cache)


def test_a_shorter_prefix_is_saved_from_a_longer_state(small_model, store):
    cache, shorter = fed(small_model, IDS[:512]), fed(small_model, IDS[:512])
    key = store.save(IDS[:384], cache)
    shorter.rewind(384)
    restored, count = store.restore(IDS)
    assert (count, cache.offset) == (384, 512) and same_state(restored, shorter)
    assert key == hashlib.sha1(IDS[:384].astype("<i4").tobytes()).hexdigest()


def test_any_length_from_one_on(small_model, store):
    cache = small_model.make_cache()
    for length in range(1, 10):
        fed(small_model, IDS[length - 1 : length], cache)
        store.save(IDS[:length], cache)
    for length in range(1, 10):
        assert store.restore(IDS[:length])[1] == length
    assert store.restore(IDS[5:])[1] == 0 and store.restore([])[1] == 0


@pytest.mark.parametrize("wrong", [[], list(range(301))])
def test_lengths_that_cannot_be_saved(small_model, store, wrong):
    cache = fed(small_model, IDS[:300])
    with pytest.raises(DataError, match=f"cannot save {len(wrong)} tokens"):
        store.save(wrong, cache)
    with pytest.raises(RewindError):
        store.save(IDS[:20], cache)
    with pytest.raises(DataError, match="reason"):
        store.save(IDS[:300], cache, reason="whim")
    assert not list(store.directory.rglob("*.kv"))


def test_a_store_opened_from_a_kind_alone(small_model, store):
    """Finds what the model saved, and nothing of a kind that differs in anything."""
    cache = fed(small_model, IDS[:200])
    store.save(IDS[:200], cache)
    kind = small_model.kind
    others = {"weights": "another", "rounding": "none", "dtype": mx.bfloat16}
    for name, value in others.items():
        with KVStore(store.directory, kind=replace(kind, **{name: value})) as other:
            assert other.restore(IDS)[1] == 0
    with KVStore(store.directory, kind=kind) as other:
        restored, count = other.restore(IDS)
        assert count == 200 and same_state(restored, cache)
        want = run(small_model, IDS[200:205], cache)
        assert np.array_equal(run(small_model, IDS[200:205], restored), want)


@pytest.mark.parametrize("both", [False, True])
def test_a_store_needs_a_model_or_a_kind(bare_model, tmp_path, both):
    given = {"model": bare_model, "kind": bare_model.kind} if both else {}
    with pytest.raises(DataError, match="a model, or the kind"):
        KVStore(tmp_path / "kv", **given)
    assert not (tmp_path / "kv").exists()


def test_another_model_rounding_or_type_finds_nothing(small_dir, tiny_dir, small_model, store):
    store.save(IDS[:200], fed(small_model, IDS[:200]))
    others = [
        load(small_dir, dtype=mx.float32, rounding="none")[0],
        load(small_dir, dtype=mx.bfloat16)[0],
        load(tiny_dir, dtype=mx.float32)[0],
    ]
    changed = load(small_dir, dtype=mx.float32)[0]
    changed.identity = None  # not loaded from a directory, so its parameters speak for it
    changed.norm.weight = changed.norm.weight + 1
    for model in [*others, changed]:
        assert KVStore(store.directory, model=model).restore(IDS)[1] == 0
    with pytest.raises(DataError, match="not one of the store's model"):
        store.save(IDS[:9], fed(others[0], IDS[:9]))
    same = load(small_dir, dtype=mx.float32)[0]
    assert KVStore(store.directory, model=same).restore(IDS)[1] == 200


# The directory


def test_files_are_private(small_model, store):
    os.umask(os.umask(0o022))
    store.save(IDS[:200], fed(small_model, IDS[:200]))
    for path in [store.directory, *store.directory.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_text_is_kept_only_if_wanted(talker, tmp_path):
    model, tokenizer = talker
    ids = tokenizer.encode("A secret that nobody reads.")
    for keep in (True, False):
        store = KVStore(tmp_path / str(keep), model=model, tokenizer=tokenizer, keep_text=keep)
        store.save(ids, fed(model, np.array(ids)))
        raw = b"".join(path.read_bytes() for path in store.directory.rglob("*.kv"))
        assert (b"A secret" in raw) == keep
        assert store.restore(ids)[1] == len(ids)


def test_an_index_that_is_lost_or_nonsense_is_made_again(small_model, store):
    cache = fed(small_model, IDS[:300])
    store.save(IDS[:300], cache)
    index = store.directory / "index.jsonl"
    for content in (b"", b"nonsense\n", index.read_bytes()[:-30], os.urandom(500)):
        index.write_bytes(content)
        restored, count = KVStore(store.directory, model=small_model).restore(IDS)
        assert count == 300 and same_state(restored, cache)


def test_several_open_stores_see_each_others_saves(small_model, store):
    other = KVStore(store.directory, model=small_model)
    for end in (100, 200):
        store.save(IDS[:end], fed(small_model, IDS[:end]))
        assert other.restore(IDS)[1] == end
    other.save(IDS[:250], fed(small_model, IDS[:250]))
    assert store.restore(IDS)[1] == 250


def test_saving_goes_on_beside_the_state(small_model, store):
    """`save_soon` has taken what it needs when it returns."""
    cache = fed(small_model, IDS[:300])
    futures = []
    for end in range(300, 330):
        futures.append(store.save_soon(IDS[:end], cache, "continue"))
        fed(small_model, IDS[end : end + 1], cache)
    cache.rewind(310)
    fed(small_model, IDS[:50], cache)
    assert len({future.result(timeout=60) for future in futures}) == 30
    straight = fed(small_model, IDS[:300])
    for end in range(300, 329):
        assert same_state(store.restore(IDS[:end])[0], straight)
        fed(small_model, IDS[end : end + 1], straight)


def test_a_closed_store_says_so(small_model, store):
    store.close()
    with pytest.raises(DataError, match="the store is closed"):
        store.save(IDS[:5], fed(small_model, IDS[:5]))
