"""The draft blocks' part of a decode state: rewound, recorded and stored with the main layers'."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import SMALL

from ds4mlx import DataError, KVStore, ModelConfig
from ds4mlx.state.boundaries import Spacing
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.record import record_bytes
from ds4mlx.state.step import commit
from ds4mlx.store.state_bytes import made_under

IDS = np.random.default_rng(0).integers(0, 288, 500)


def drafted(model, ends, state, lag=0):
    """Feed IDS up to each of `ends`, and the draft block up to `lag` behind the last; its logits."""
    logits = []
    for end in ends:
        first = state.drafts[0].offset
        assert first == state.offset
        streams = model.streams(mx.array(IDS[None, first:end]), state)
        count = end - first - (lag if end == ends[-1] else 0)
        tokens = mx.array(IDS[None, first + 1 : first + count + 1])
        logits.append(np.array(model.draft(streams[:, :count], tokens, state)[0]))
    return logits


def closely(model):
    state = model.make_cache()
    state.boundaries.spacing = Spacing(dense=64, near=512, sparse=256)
    return state


@pytest.mark.parametrize(("ends", "target"), [([100, 150], 100), ([64, 230, 400], 64)])
def test_drafting_goes_on_after_a_rewind_as_if_nothing_had_been_undone(small_model, ends, target):
    """Within the buffers' reach, and back to a boundary beyond it."""
    state, straight = closely(small_model), closely(small_model)
    drafted(small_model, ends, state)
    drafted(small_model, [target], straight)
    state.rewind(target)
    assert (state.offset, state.drafts[0].offset) == (target, target)
    more = [target + 1, target + 40]
    got, want = drafted(small_model, more, state), drafted(small_model, more, straight)
    assert all(np.array_equal(one, other) for one, other in zip(got, want, strict=True))


def test_a_draft_that_lags_behind_stays_where_it_is(small_model):
    state = closely(small_model)
    drafted(small_model, [100], state, lag=7)
    state.rewind(95)
    assert (state.offset, state.drafts[0].offset) == (95, 93)
    state.rewind(0)
    assert state.drafts[0].offset == 0 and not state.drafts.arrays


@pytest.mark.parametrize("lag", [0, 1, 50])
def test_the_store_brings_the_draft_back(small_model, tmp_path, lag):
    state = closely(small_model)
    drafted(small_model, [150], state, lag)
    with KVStore(tmp_path / "kv", model=small_model) as store:
        store.save(IDS[:150], state)
        restored, reached = store.restore(IDS)
    assert reached == 150 and restored.drafts[0].offset == 150 - lag
    assert np.array_equal(restored.record(150), state.record(150))
    streams, tokens = mx.ones((1, lag, 4, SMALL["hidden_size"])), mx.array(IDS[None, :lag])
    if lag:
        got, want = (small_model.draft(streams, tokens, one)[0] for one in (restored, state))
        assert np.array_equal(got, want)


def test_a_state_without_drafts_has_the_bytes_of_its_main_layers(small_model):
    state = closely(small_model)
    mx.eval(small_model(mx.array(IDS[None, :130]), cache=state))
    bare = state.nbytes
    assert all(state.record(n).nbytes == record_bytes(state.layers, n) for n in (64, 128, 130))
    small_model.draft(mx.ones((1, 10, 4, SMALL["hidden_size"])), mx.array(IDS[None, :10]), state)
    assert state.record(130).nbytes > record_bytes(state.layers, 130)
    assert state.nbytes > bare


@pytest.mark.parametrize("tokens", [1, 4, 131, 300])
def test_compressed_rows_of_a_draft_stand_in_the_section(tokens):
    config = ModelConfig(**{**SMALL, "compress_ratios": [0, 4, 128, 4], "num_experts_per_tok": 2})
    state, other = DecodeState(config), DecodeState(config)
    step = state.drafts.step(0, tokens, ())
    for layer in state.drafts:
        layer.window.extend(numbers(tokens, layer.form.elements, layer.form.dtype), 127, step)
        for part in layer.compressors:
            projected = numbers(tokens, 2 * part.channels, mx.float32).reshape(tokens, 2, -1)
            part.recent.extend(projected, part.ratio - 1, step)
            part.rows.extend(numbers(tokens // 4, part.form.elements, part.form.dtype), step)
    state.drafts.finish(0, step, ())
    commit([step])
    section = state.drafts.section(tokens)
    other.drafts.load(section)
    assert other.drafts[0].offset == tokens
    assert np.array_equal(other.drafts.section(tokens), section)
    for one, same in zip(state.drafts[0].compressors, other.drafts[0].compressors, strict=True):
        assert one.rows.count == same.rows.count == tokens // 4


def numbers(count, width, dtype):
    return mx.arange(count * width).reshape(count, width).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "count", "depth", "why"),
    [
        ((1, 9, 4, 128), 9, 0, "beyond the state"),
        ((1, 3, 4, 128), 4, 0, "streams for these tokens"),
        ((1, 3, 4, 128), 3, 1, "draft blocks"),
    ],
)
def test_drafts_that_are_refused(small_model, shape, count, depth, why):
    state = small_model.make_cache()
    mx.eval(small_model(mx.array(IDS[None, :8]), cache=state))
    with pytest.raises(DataError, match=why):
        small_model.draft(mx.ones(shape), mx.array(IDS[None, :count]), state, depth)
    assert state.drafts[0].offset == 0


def test_a_save_copies_only_the_records_that_are_not_stored(small_model, tmp_path):
    state = closely(small_model)
    mx.eval(small_model(mx.array(IDS[None, :300]), cache=state))
    with KVStore(tmp_path / "kv", model=small_model) as store:
        store.save(IDS[:300], state)

        def taken():
            job = store._taker(made_under(state)).take(IDS[:300].astype("<i4"), state, "cold")
            return [piece.item.tokens for piece in job.records]

        assert taken() == [300]
        state.rewind(128)
        mx.eval(small_model(mx.array(IDS[None, 128:300]), cache=state))
        made_anew = [p for p in state.records if p > 128]
        assert made_anew and taken() == [*made_anew, 300]
