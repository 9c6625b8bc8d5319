"""The decode state: storage against a naive list, rewinding, memory."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import run, run_chunks

from ds4mlx.cache import REWIND, SLACK, DecodeState, Recent, RewindError, Rows, state_bytes
from ds4mlx.config import ModelConfig


def numbered(start: int, count: int) -> mx.array:
    """Rows (1, count, 2) that carry their own number."""
    return mx.broadcast_to(
        mx.arange(start, start + count, dtype=mx.float32)[None, :, None], (1, count, 2)
    )


@settings(max_examples=60, deadline=None)
@given(
    keep=st.integers(1, 40),
    steps=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 40)), min_size=1, max_size=12),
)
def test_recent_returns_the_rows_before_and_the_new_ones(keep, steps):
    recent, end = Recent(keep), 0
    for count, back in steps:
        back = min(back, keep)
        got = np.array(recent.extend(numbered(end, count), back))[0, :, 0]
        assert got.tolist() == list(range(max(0, end - back), end + count))
        end += count
        assert recent.end == end
        assert recent.reaches(max(0, end - keep))
        assert recent.buffer is not None and recent.buffer.shape[1] == keep + SLACK


@settings(max_examples=60, deadline=None)
@given(
    growth=st.integers(1, 30),
    steps=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12),
)
def test_rows_hold_everything_through_growth_and_truncation(growth, steps):
    rows, count = Rows(growth), 0
    for more, fewer in steps:
        got = np.array(rows.extend(numbered(count, more)))[0, :, 0]
        count += more
        assert got.tolist() == list(range(count))
        count = max(0, count - fewer)
        rows.truncate(count)


def snapshot(cache: DecodeState) -> list[np.ndarray]:
    """What continuing reads: needed recent rows and all compressed rows of every layer."""
    parts = []
    for layer in cache:
        needs = [(layer.window, max(0, layer.offset - layer.before))]
        needs += [(c.recent, c.needed(layer.offset)) for c in layer.compressors]
        for recent, oldest in needs:
            if recent.buffer is not None:
                held = slice(oldest - recent.start, recent.end - recent.start)
                parts.append(np.array(recent.buffer[:, held]))
        for part in layer.compressors:
            if part.rows.count:
                parts.append(np.array(part.rows.buffer[:, : part.rows.count]))
    return parts


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
    ids = np.random.default_rng(0).integers(0, 288, 1500)
    for back in (1, 77, REWIND):
        cache = small_model.make_cache()
        run(small_model, ids, cache)
        cache.rewind(1500 - back)
        assert cache.offset == 1500 - back
    cache.rewind(0)
    fresh = small_model.make_cache()
    assert np.array_equal(run(small_model, ids[:9], cache), run(small_model, ids[:9], fresh))


@pytest.mark.parametrize(("wanted", "nearest"), [(1200, 1372), (3, 0), (1501, 1500), (-1, 0)])
def test_unreachable_rewind_names_the_nearest_and_changes_nothing(small_model, wanted, nearest):
    cache = small_model.make_cache()
    run(small_model, np.arange(1500) % 288, cache)
    before = snapshot(cache)
    with pytest.raises(RewindError, match=f"rewind to {wanted} of 1500 .* {nearest}$") as error:
        cache.rewind(wanted)
    assert error.value.nearest == nearest and cache.offset == 1500
    assert all(np.array_equal(a, b) for a, b in zip(before, snapshot(cache), strict=True))


def test_decoding_3000_tokens_keeps_memory_flat_apart_from_the_rows(small_model):
    cache, token = small_model.make_cache(), mx.array([[7]])
    mx.eval(small_model(mx.array([[5] * 10]), cache=cache))
    mx.clear_cache()
    live, peak = mx.get_active_memory() - cache.nbytes, 0
    for step in range(3000):
        mx.eval(small_model(token, cache=cache))
        if step % 100 == 50:
            peak = max(peak, mx.get_active_memory() - cache.nbytes - live)
    assert cache.offset == 3010
    assert peak < 64 * 1024
    assert cache.nbytes == state_bytes(small_model.args, 3010, itemsize=4)


def test_evaluating_logits_leaves_no_graph_behind(small_model):
    """Also the arrays that the logits do not need, such as the projections of an open group."""
    cache = small_model.make_cache()
    mx.eval(small_model(mx.array([[1, 2, 3]]), cache=cache))
    before = mx.get_active_memory()
    for array in cache.arrays:
        assert np.array(array).shape == array.shape
    assert mx.get_active_memory() == before


@pytest.mark.parametrize("tokens", [1, 127, 128, 5000, 100_000])
def test_state_bytes_are_the_bytes_of_a_state(tokens):
    """Checked on one layer of each kind with rows of the real sizes, extended in one go."""
    config = ModelConfig(
        num_hidden_layers=3, compress_ratios=(0, 4, 128), num_nextn_predict_layers=0
    )
    cache = DecodeState(config)
    for layer in cache:
        layer.window.extend(mx.zeros((1, tokens, 512), mx.bfloat16), 0)
        for part, width in zip(layer.compressors, (512, 128), strict=False):
            lanes = 2 if part.overlap else 1
            part.recent.extend(mx.zeros((1, tokens, 2, lanes * width)), 0)
            part.rows.extend(mx.zeros((1, tokens // part.ratio, width), mx.bfloat16))
    assert cache.nbytes == state_bytes(config, tokens)


def test_a_million_tokens_of_flash_stay_under_seven_and_a_half_gigabytes():
    assert 6.8e9 < state_bytes(ModelConfig(), 1_000_000) < 7.5e9
