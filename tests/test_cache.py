"""The decode state: storage against a naive list, rewinding, memory."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import run, run_chunks

from ds4mlx import load
from ds4mlx.config import ModelConfig
from ds4mlx.state.boundaries import Spacing
from ds4mlx.state.buffers import SLACK, Recent, Rows
from ds4mlx.state.decode_state import RECORDS, DecodeState, RewindError, state_bytes
from ds4mlx.state.layer import REWIND
from ds4mlx.state.record import record_bytes
from ds4mlx.state.step import Step, commit


def numbered(start: int, count: int) -> mx.array:
    """Rows (count, 2) that carry their own number."""
    return mx.broadcast_to(mx.arange(start, start + count, dtype=mx.float32)[:, None], (count, 2))


def stepped(part, *arguments) -> np.ndarray:
    """The first column of what extending a part of a state gives, in a step of its own."""
    step = Step(0, 0)
    rows = part.extend(*arguments, step)
    commit([step])
    return np.array(rows)[:, 0]


@settings(max_examples=60, deadline=None)
@given(
    keep=st.integers(1, 40),
    steps=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 40)), min_size=1, max_size=12),
)
def test_recent_returns_the_rows_before_and_the_new_ones(keep, steps):
    recent, end = Recent(keep), 0
    for count, back in steps:
        back = min(back, keep)
        got = stepped(recent, numbered(end, count), back)
        assert got.tolist() == list(range(max(0, end - back), end + count))
        end += count
        assert recent.end == end
        assert recent.reaches(max(0, end - keep))
        assert recent.buffer is not None and recent.buffer.shape[0] == keep + SLACK


@settings(max_examples=60, deadline=None)
@given(
    growth=st.integers(1, 30),
    steps=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12),
)
def test_rows_hold_everything_through_growth_and_truncation(growth, steps):
    rows, count = Rows(growth), 0
    for more, fewer in steps:
        got = stepped(rows, numbered(count, more))
        count += more
        assert got.tolist() == list(range(count))
        count = max(0, count - fewer)
        rows.truncate(count)


def snapshot(cache: DecodeState) -> list[np.ndarray]:
    """What continuing reads: the boundary record and all compressed rows of every layer."""
    if cache.offset == 0:
        return []
    held = [part.rows for layer in cache for part in layer.compressors if part.rows.count]
    return [np.array(cache.record(cache.offset)), *(np.array(r.buffer[: r.count]) for r in held)]


@pytest.mark.parametrize(
    ("prefill", "decoded", "back"),
    [
        (300, 0, 1),
        (300, 0, 128),
        (130, 5, 3),
        (260, 130, 128),
        (127, 2, 2),
        (700, 0, 97),
        (5, 0, 5),
    ],
)
def test_rewind_restores_the_state_exactly(small_model, prefill, decoded, back):
    """The state, and what follows from it, equal those of a run that never went further."""
    ids = np.random.default_rng(prefill).integers(0, 288, prefill + decoded + 20)
    total, target = prefill + decoded, prefill + decoded - back
    straight = small_model.make_cache()
    if target:  # the same chunk boundaries as far as the target
        run_chunks(small_model, ids[:target], [min(prefill, target)] + [1] * target, straight)
    cache = small_model.make_cache()
    run_chunks(small_model, ids[:total], [min(prefill, target)] + [1] * total, cache)
    cache.rewind(target)
    assert cache.offset == target
    for got, want in zip(snapshot(cache), snapshot(straight), strict=True):
        assert np.array_equal(got, want)
    branch = np.random.default_rng(1).integers(0, 288, 40)
    assert np.array_equal(run(small_model, branch, cache), run(small_model, branch, straight))


def test_rewind_is_always_possible_for_the_last_128_and_for_0(small_model):
    ids = np.random.default_rng(0).integers(0, 288, 600)
    for back in (1, 77, REWIND):
        cache = small_model.make_cache()
        run(small_model, ids, cache)
        cache.rewind(600 - back)
        assert cache.offset == 600 - back
    cache.rewind(0)
    fresh = small_model.make_cache()
    assert np.array_equal(run(small_model, ids[:9], cache), run(small_model, ids[:9], fresh))


@pytest.fixture(scope="module")
def long_state(small_model):
    """A state of 1,500 tokens, which no test changes."""
    cache = small_model.make_cache()
    run(small_model, np.arange(1500) % 288, cache)
    return cache


@pytest.mark.parametrize(("wanted", "nearest"), [(1200, 1372), (3, 0), (1501, 1500), (-1, 0)])
def test_unreachable_rewind_names_the_nearest_and_changes_nothing(long_state, wanted, nearest):
    cache = long_state
    before = snapshot(cache)
    with pytest.raises(RewindError, match=f"rewind to {wanted} of 1500 .* {nearest}$") as error:
        cache.rewind(wanted)
    assert error.value.nearest == nearest and cache.offset == 1500
    with pytest.raises(TypeError):
        cache.rewind(1499.5)
    assert all(np.array_equal(a, b) for a, b in zip(before, snapshot(cache), strict=True))


def test_decoding_keeps_memory_flat_apart_from_the_rows(small_model):
    """140 tokens need new buffers of every recent part, and complete rows of both kinds."""
    cache, token = small_model.make_cache(), mx.array([[7]])
    mx.eval(small_model.streams(mx.array(np.arange(1000)[None] % 288), cache))
    mx.eval(small_model(token, cache=cache))
    mx.clear_cache()
    live, peak = mx.get_active_memory() - cache.nbytes, 0
    for step in range(140):
        mx.eval(small_model(token, cache=cache))
        if step % 20 == 10:
            peak = max(peak, mx.get_active_memory() - cache.nbytes - live)
    assert cache.offset == 1141
    assert peak < 64 * 1024
    assert cache.nbytes == state_bytes(small_model.args, 1141, mx.float32)


def test_evaluating_logits_leaves_no_graph_behind(small_model):
    """Also the arrays that the logits do not need, such as the projections of an open group."""
    cache = small_model.make_cache()
    mx.eval(small_model(mx.array([[1, 2, 3]]), cache=cache))
    before = mx.get_active_memory()
    for array in cache.arrays:
        assert np.array(array).shape == array.shape
    assert mx.get_active_memory() == before


@pytest.mark.parametrize("tokens", [1, 127, 128, 5000, 40_000])
@pytest.mark.parametrize("rounding", ["official", "none"])
def test_state_bytes_are_the_bytes_of_a_state(tokens, rounding):
    """Checked on one layer of each kind with rows of the real sizes, extended in one go."""
    config = ModelConfig(
        num_hidden_layers=3, compress_ratios=(0, 4, 128), num_nextn_predict_layers=0
    )
    cache = DecodeState(config, rounding=rounding)
    step = cache.step(tokens)
    for layer in cache:
        layer.window.extend(blank(layer.form, tokens), 127, step)
        for part in layer.compressors:
            part.recent.extend(mx.zeros((tokens, 2, part.channels)), part.ratio - 1, step)
            part.rows.extend(blank(part.form, tokens // part.ratio), step)
    cache.finish(step)
    commit([step])
    assert cache.nbytes == state_bytes(config, tokens, rounding=rounding)


def blank(form, count):
    return mx.zeros((count, form.elements), form.dtype)


def test_a_million_tokens_of_flash_stay_under_3_8_gigabytes():
    assert 3.5e9 < state_bytes(ModelConfig(), 1_000_000) < 3.8e9
    assert 6.8e9 < state_bytes(ModelConfig(), 1_000_000, rounding="none") < 7.5e9


# Boundary records


CLOSE = Spacing(dense=256, near=2048, sparse=1024)  # so that short sequences have boundaries


@pytest.mark.parametrize("rounding", ["official", "none"])
@pytest.mark.parametrize("chunks", [[256, 256, 88], [255, 1, 200, 144]])
def test_a_rewind_to_a_boundary_is_the_state_of_a_run_that_ended_there(small_dir, rounding, chunks):
    """However far behind it is."""
    model = load(small_dir, dtype=mx.float32, rounding=rounding)[0]
    ids = np.random.default_rng(5).integers(0, 288, 600)
    cache, straight = model.make_cache(), model.make_cache()
    cache.boundaries.spacing = CLOSE
    run_chunks(model, ids, chunks, cache)
    assert sorted(cache.records) == [256, 512]
    run_chunks(model, ids[:256], chunks, straight)
    cache.rewind(256)
    assert cache.offset == 256 and list(cache.records) == [256]
    for got, expected in zip(snapshot(cache), snapshot(straight), strict=True):
        assert np.array_equal(got, expected)
    branch = np.random.default_rng(1).integers(0, 288, 40)
    assert np.array_equal(run(model, branch, cache), run(model, branch, straight))


def test_a_boundary_within_a_chunk_is_that_of_a_run_that_could_still_step_back(small_model):
    """The chunk decides the bits of the rows; the record must belong to them."""
    ids = np.random.default_rng(6).integers(0, 288, 300)
    cache, straight = small_model.make_cache(), small_model.make_cache()
    cache.boundaries.spacing = CLOSE
    for each in (cache, straight):
        run_chunks(small_model, ids, [100], each)
    straight.rewind(256)
    assert np.array_equal(cache.records[256], straight.record(256))
    cache.rewind(256)
    for got, expected in zip(snapshot(cache), snapshot(straight), strict=True):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("tokens", [1, 3, 4, 6, 127, 128, 131, 300])
def test_a_record_is_what_continuing_reads(small_model, tokens):
    """A state made of the record and the rows alone continues as the one it was taken from."""
    model, ids = small_model, np.random.default_rng(tokens).integers(0, 288, 330)
    cache, copy = model.make_cache(), model.make_cache()
    run(model, ids[:tokens], cache)
    record = cache.record(tokens)
    assert record.nbytes == record_bytes(cache.layers, tokens)
    copy.load(record, tokens)
    for ours, theirs in zip(copy, cache, strict=True):
        for part, other in zip(ours.compressors, theirs.compressors, strict=True):
            if other.rows.buffer is not None:
                part.rows.load(mx.array(other.rows.buffer), other.rows.count)
    assert np.array_equal(copy.record(tokens), record)
    want = [run(model, ids[tokens:], cache), run(model, ids[:1], cache)]
    got = [run(model, ids[tokens:], copy), run(model, ids[:1], copy)]
    assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_boundary_that_was_asked_for_gets_a_record_within_a_chunk(small_model):
    ids = np.random.default_rng(0).integers(0, 288, 1000)
    cache = small_model.make_cache()
    cache.add_boundary(384)
    run(small_model, ids, cache)
    assert list(cache.records) == [384]
    cache.rewind(384)
    assert cache.offset == 384
    with pytest.raises(RewindError, match="nearest reachable is 384"):
        cache.rewind(200)


def test_after_a_record_only_what_was_appended_since_can_be_undone(small_model):
    """And boundaries that lie ahead stay asked for."""
    ids, cache = np.arange(700) % 288, small_model.make_cache()
    cache.add_boundary(200)
    cache.add_boundary(210)
    cache.add_boundary(900)
    run(small_model, ids, cache)
    cache.rewind(210)
    with pytest.raises(RewindError, match="nearest reachable is 210"):
        cache.rewind(209)
    assert list(cache.records) == [200, 210] and cache.boundaries.asked == {900}
    run(small_model, ids[:50], cache)
    for tokens in (259, 211, 210):
        cache.rewind(tokens)
        assert cache.offset == tokens
    cache.rewind(200)
    assert cache.boundaries.asked == {900}


@given(
    st.sets(st.integers(1, 200_000), min_size=1, max_size=60),
    st.integers(0, 50_000),
)
def test_thinning_keeps_a_boundary_near_every_point(extra, more):
    """As near as Spacing says, or as near as the nearest there was."""
    spacing = Spacing()
    positions = extra | set(range(2048, max(extra), 2048))
    end = max(extra) + more
    kept = spacing.thinned(positions, end)
    assert max(positions) in kept <= positions
    last = 0
    for boundary in sorted(kept):
        dense = boundary > end - spacing.near
        between = [p for p in positions if last < p < boundary]
        reach = spacing.dense if dense else spacing.sparse
        assert boundary - last <= reach or not between
        last = boundary
    assert len(spacing.thinned(range(2048, 100_001, 2048), 100_000)) <= 20


def test_a_long_state_holds_few_records():
    step = Spacing().dense
    for end in (8192, 100_352, 250_000 // step * step, 1_048_576):
        coarse = Spacing().coarsened(end, RECORDS)
        assert len(coarse.thinned(range(step, end + 1, step), end)) <= RECORDS + 2
