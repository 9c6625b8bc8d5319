"""Prompts by chunks of any lengths, and what a chunk of Flash has in memory, on any machine."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_step_launches import flash

from ds4mlx.bench.synthetic_state import same_state
from ds4mlx.custom_kernels.graph import alive
from ds4mlx.custom_kernels.recording import recording
from ds4mlx.engine import room
from ds4mlx.engine.prefill import prefill_chunk
from ds4mlx.model.batch import Batch
from ds4mlx.model.pace import Pace
from ds4mlx.state.blank import fill_blank
from ds4mlx.state.step import Step

IDS = (7 * np.arange(300) % 288).tolist()
LATE = (
    200  # operations of a GPU that may have been submitted and not done: about ten command buffers
)


@pytest.fixture(scope="module")
def whole(small_model):
    state = small_model.make_cache()
    return state, np.array(prefill_chunk(small_model, IDS, state, True))


@settings(max_examples=3)
@given(st.sets(st.integers(1, 299), min_size=2, max_size=4))
def test_lengths_change_from_chunk_to_chunk(small_model, whole, cuts):
    state, logits = small_model.make_cache(), None
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 300], strict=True):
        logits = prefill_chunk(small_model, IDS[start:end], state, end == 300)
    np.testing.assert_allclose(np.array(logits), whole[1], atol=1e-4)
    assert state.offset == 300


def test_a_chunk_leaves_its_arrays_to_no_collector(small_model):
    """Its steps are gone when it ends, without a search for circles."""
    state = small_model.make_cache()
    gc.collect()
    gc.disable()
    try:
        prefill_chunk(small_model, IDS, state, True)
        left = [each for each in gc.get_objects() if type(each) in (Pace, Step)]
    finally:
        gc.enable()
    assert left == []


def test_it_gives_what_a_call_gives(small_model, whole):
    state = small_model.make_cache()
    logits = small_model.last_logits(mx.array([IDS]), state)
    np.testing.assert_allclose(np.array(logits), whole[1], atol=1e-5)
    assert same_state(state, whole[0])


def test_rows_are_not_copied(small_model):
    """As long as their buffer has room; though each layer is evaluated on its own."""
    state = small_model.make_cache()
    prefill_chunk(small_model, IDS[:200], state, False)

    def places():
        buffers = (part.rows.buffer for layer in state for part in layer.compressors)
        return [np.asarray(memoryview(buffer)).ctypes.data for buffer in buffers]

    before = places()
    prefill_chunk(small_model, IDS[200:], state, True)
    assert len(before) >= 3 and places() == before


@pytest.fixture(scope="module")
def q2():
    return flash("q2", "none", 5)


@pytest.mark.parametrize("tokens", [512, 2048, 4096])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_scratch_of_a_chunk(q2, tokens, layer):
    """The same at any depth but for the rows written and a block of scores, and what the plan says."""
    most = []
    for depth in (4096, 65_536, 1_000_000):
        state = fill_blank(q2.make_cache(), depth)
        step = state.step(tokens)
        batch = Batch.of(mx.zeros((tokens,), mx.int32), [step], q2._rotary)
        streams = mx.zeros((tokens, q2.args.hc_mult, q2.args.hidden_size), q2.dtype)
        with recording("cuda"):
            out = q2.layers[layer](streams, batch, [state[layer]])
            most.append(alive(mx.depends([out], step.arrays)[0], late=LATE))
    plan = room.Plan(q2.args, 0, 0, 1 << 20, chunk=tokens, kernels=True)
    assert max(most) <= plan.scratch
