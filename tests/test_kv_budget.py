"""The KV store's budget: what goes when it is full, on synthetic states."""

import numpy as np
import pytest

from ds4mlx import KVStore
from ds4mlx.bench.synthetic_state import synthetic_state
from ds4mlx.durable import Busy, lock
from ds4mlx.state.boundaries import Spacing
from ds4mlx.store import eviction
from ds4mlx.store.eviction import StoreFull
from ds4mlx.store.locks import Claim, Pin


def saved(store, seed, length=600):
    """Save a conversation of its own; its tokens."""
    ids = np.random.default_rng(seed).integers(0, 512, length)
    store.save(ids, synthetic_state(store.kind, ids))
    return ids


def test_the_budget_is_never_exceeded_and_the_newest_stays(bare_model, tmp_path):
    store = KVStore(tmp_path, 1_000_000, bare_model, min_free_bytes=0)
    for seed in range(20):
        ids = saved(store, seed, 200 + 37 * seed)
        assert store.restore(ids)[1] == len(ids)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.kv")) <= 1_000_000
    assert store.restore(np.random.default_rng(0).integers(0, 512, 200))[1] == 0


def test_what_is_too_large_is_refused_and_evicts_nothing(bare_model, tmp_path):
    store = KVStore(tmp_path, 400_000, bare_model, min_free_bytes=0)
    ids = saved(store, 1)
    with pytest.raises(StoreFull, match="exceed the budget"):
        saved(store, 2, 6000)
    assert store.restore(ids)[1] == 600


def test_hits_save_a_prefix_from_eviction(bare_model, tmp_path):
    store = KVStore(tmp_path, 1_000_000, bare_model, min_free_bytes=0)
    first, second = saved(store, 1), saved(store, 2)
    for _ in range(3):
        store.restore(first)
    for seed in range(3, 9):
        saved(store, seed)
        store.restore(first)
    assert store.restore(second)[1] == 0 and store.restore(first)[1] == 600


def test_what_is_in_use_is_not_evicted(bare_model, tmp_path):
    """In any process: here another store object, with locks of its own."""
    store = KVStore(tmp_path, 1_000_000, bare_model, min_free_bytes=0)
    other = KVStore(tmp_path, 1_000_000, bare_model, min_free_bytes=0)
    ids = np.random.default_rng(1).integers(0, 512, 600)
    state = synthetic_state(bare_model, ids)
    other.save(ids, state)
    for seed in range(2, 12):
        saved(store, seed)
    assert store.longest(ids) == 600
    catalogue = store._catalogue
    with pytest.raises(StoreFull):
        eviction.plan(catalogue, catalogue.nbytes)
    del state
    chosen = eviction.plan(catalogue, catalogue.nbytes)
    path = catalogue.path(chosen[0].segment)
    with path.open() as file, pytest.raises(Busy):  # from now on nobody can take it up
        lock(file.fileno(), shared=True, wait=False)
    eviction.evict(catalogue, chosen)
    assert store.longest(ids) == 0 and Pin.take(path) is None


def test_a_plan_that_is_not_carried_out_lets_its_leaves_go(bare_model, tmp_path):
    store = KVStore(tmp_path, 1 << 30, bare_model, min_free_bytes=0)
    for seed in (1, 2):
        saved(store, seed)
    catalogue = store._catalogue
    catalogue.refresh()
    with pytest.raises(StoreFull):
        eviction.plan(catalogue, catalogue.nbytes + 1)
    pins = [Pin.take(catalogue.path(segment)) for segment in catalogue.segments.values()]
    assert None not in pins
    assert all(
        Claim.take(catalogue.path(segment)) is None for segment in catalogue.segments.values()
    )
    with pytest.raises(StoreFull):
        eviction.plan(catalogue, 1)
    for pin in pins:
        pin.close()
    eviction.evict(catalogue, eviction.plan(catalogue, catalogue.nbytes))
    assert store.nbytes == 0


def test_leaves_go_before_what_they_follow(bare_model, tmp_path):
    store = KVStore(tmp_path, 1 << 30, bare_model, min_free_bytes=0)
    base = np.random.default_rng(0).integers(0, 512, 9000)
    state = synthetic_state(bare_model, base[:8400])
    store.save(base[:8400], state)
    catalogue = store._catalogue
    catalogue.refresh()
    del state
    order = [leaf.segment.start for leaf in eviction.plan(catalogue, catalogue.nbytes)]
    assert order == [8192, 0]


def test_free_disk_space_is_left(bare_model, tmp_path):
    store = KVStore(tmp_path, 1 << 40, bare_model, min_free_bytes=1 << 60)
    with pytest.raises(StoreFull, match="made free"):
        saved(store, 1)
    assert not list(tmp_path.rglob("*.kv")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("allowed", "count"), [(0, 10), (400_000, 10), (900_000, 15), (1 << 30, 32)]
)
def test_boundaries_are_thinned_when_they_take_much(bare_model, tmp_path, allowed, count):
    """Records of 56,274 bytes: as many as are allowed, or the 10 that the spacing needs."""
    spacing, opened = Spacing(256, 1024, 512), {"min_free_bytes": 0, "records_bytes": allowed}
    store = KVStore(tmp_path, 1 << 30, bare_model, spacing=spacing, **opened)
    ids = np.random.default_rng(0).integers(0, 512, 4096)
    for end in range(128, 4097, 128):
        store.save(ids[:end], synthetic_state(bare_model, ids[:end]))
    catalogue = store._catalogue
    catalogue.refresh()
    positions = {record.tokens for record in catalogue.records.values()}
    assert len(positions) == count and positions >= spacing.thinned(positions, 4096)
    for point in (4096, 4000, 3500, 2000, 1200):
        reach = spacing.dense if point > 4096 - spacing.near else spacing.sparse
        assert point - store.restore(ids[:point])[1] < reach + 128
