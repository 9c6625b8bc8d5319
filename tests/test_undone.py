"""A chunk that was built but cannot be evaluated: the state is what it was before."""

import mlx.core as mx
import numpy as np
import pytest

from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.undone import undone_on_failure

IDS = (np.arange(900) % 288).tolist()


@pytest.mark.parametrize(("before", "more"), [(0, 9), (50, 1), (50, 300), (300, 400)])
def test_a_chunk_that_is_never_evaluated_is_undone(small_model, before, more):
    states = [small_model.make_cache() for _ in range(2)]
    for state in states:
        if before:
            prefill(small_model, IDS[:before], state)
        state.add_boundary(before + 1)
    chunk = mx.array([IDS[before : before + more]])
    with (
        pytest.raises(RuntimeError, match="allocate"),
        undone_on_failure(states[:1], far=more > 128),
    ):
        small_model.streams(chunk, states[0])
        assert states[0].offset == before + more
        raise RuntimeError("unable to allocate")
    assert states[0].offset == before and not states[0].records
    assert states[0].boundaries.asked == {before + 1}
    got, want = (np.array(prefill(small_model, IDS[before : before + 9], s)) for s in states)
    assert np.array_equal(got, want)
