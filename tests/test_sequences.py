"""Several sequences in one call, what a call refuses, and calls that fail in the middle."""

import mlx.core as mx
import numpy as np
import pytest
from ahead import bits
from reference import run

from ds4mlx import DecodeState, ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.model.attention import Attention
from ds4mlx.model.compressor import Compressor
from ds4mlx.model.hyper import HyperHead
from ds4mlx.model.indexer import Indexer
from ds4mlx.model.moe import MoE
from ds4mlx.state.boundaries import Spacing
from ds4mlx.state.buffers import Recent, Rows

IDS = np.random.default_rng(4).integers(0, 288, 600)


def state_after(model, count) -> DecodeState:
    state = model.make_cache()
    state.boundaries.spacing = Spacing(256, 2048, 1024)
    if count:
        mx.eval(model.streams(mx.array(IDS[None, :count]), state))
    return state


def test_sequences_of_one_call_get_the_logits_of_each_alone(exact_small):
    """Prefill, then decode, at different lengths and depths, across rows of both compressors."""
    depths, lengths = (0, 3, 130, 255), (140, 1, 126, 5)
    pieces = [IDS[d : d + n] for d, n in zip(depths, lengths, strict=True)]
    states = [state_after(exact_small, depth) for depth in depths]
    alone = [state_after(exact_small, depth) for depth in depths]
    together = exact_small([pieces[0].tolist(), *map(mx.array, pieces[1:])], cache=states)
    for logits, piece, state in zip(together, pieces, alone, strict=True):
        assert np.abs(np.array(logits) - run(exact_small, piece, state)).max() <= 5e-5
    for token in (7, 9):
        tokens = mx.array([token, 1, 2, 3])
        logits = exact_small.step(tokens, states)
        assert logits.shape == (4, 288)
        for row, token_id, state in zip(logits, tokens.tolist(), alone, strict=True):
            want = run(exact_small, [token_id], state)[0]
            assert np.abs(np.array(row) - want).max() <= 5e-5
    assert [state.offset for state in states] == [state.offset for state in alone]
    assert [list(s.records) for s in states] == [list(s.records) for s in alone]


def test_a_rectangle_and_a_list_without_states(exact_small):
    rectangle = exact_small(mx.array(IDS[:40].reshape(2, 20)))
    lists = exact_small([IDS[:20], IDS[20:40].tolist()])
    assert rectangle.shape == (2, 20, 288) and [row.shape for row in lists] == [(20, 288)] * 2
    for row, each, ids in zip(rectangle, lists, IDS[:40].reshape(2, 20), strict=True):
        want = run(exact_small, ids)
        assert np.abs(np.array(row) - want).max() <= 5e-5
        assert np.abs(np.array(each) - want).max() <= 5e-5


REFUSED = {
    "an empty list": ([], 0, "at least one sequence"),
    "no sequences": (np.zeros((0, 3), np.int32), 0, "at least one sequence"),
    "a sequence without tokens": ([[1], []], 2, "sequence 1 of the call has no tokens"),
    "no tokens": (mx.zeros((1, 0), mx.int32), 1, "no tokens"),
    "one rank too few": (mx.array([1, 2]), 1, r"must be \(B, L\)"),
    "one rank too many": (mx.zeros((1, 1, 1), mx.int32), 1, r"must be \(B, L\)"),
    "numbers instead of sequences": ([1, 2], 2, r"must be \(L,\)"),
    "nested too deep": ([[[1]]], 1, r"must be \(L,\)"),
    "ragged inside": ([[[1], [1, 2]]], 1, "integers"),
    "fractions": (mx.array([[1.0]]), 1, "integers, not"),
    "truth values": (np.array([[True]]), 1, "integers, not"),
    "text": (["ab"], 1, r"must be \(L,\)"),
    "a number": (5, 1, "not int"),
    "beyond the vocabulary": ([[1, 288]], 1, "token id 288 is outside"),
    "below it": (np.array([[1, -1]]), 1, "token id -1 is outside"),
    "beyond 32 bits": ([[2**40]], 1, "is outside the vocabulary"),
    "in a chunk": (mx.array([[1, 300]]), 1, "token id 300 is outside"),
    "one state too few": ([[1], [2]], 1, "2 sequences need 2 decode states, not 1"),
    "one too many": (mx.array([[1]]), 2, "1 sequences need 1 decode states, not 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_before_anything_moves(small_model, name):
    tokens, count, message = REFUSED[name]
    states = [state_after(small_model, 5) for _ in range(count)]
    with pytest.raises(DataError, match=message):
        small_model(tokens, cache=states)
    assert all(state.offset == 5 for state in states)


def test_states_that_do_not_fit_are_refused(small_model):
    state, ids = state_after(small_model, 5), mx.array([[1], [2]])
    with pytest.raises(DataError, match="same decode state"):
        small_model(ids, cache=[state, state])
    other = DecodeState(ModelConfig(num_hidden_layers=3, compress_ratios=(0, 4, 128)))
    with pytest.raises(DataError, match="cache 1 is not a state of this model"):
        small_model(ids, cache=[state, other])
    with pytest.raises(DataError, match="cache 0 is a list, not a decode state"):
        small_model(ids, cache=[[], state])
    with pytest.raises(DataError, match="9 sequences at once"):
        small_model.step(mx.array([1] * 9), [state] * 9)
    with pytest.raises(DataError, match="outside the vocabulary"):
        small_model.step([288], [state])
    assert state.offset == 5


# Where a call is made to fail, and how often it has passed there before.
SITES = [
    *[(kind, "__call__", passed) for kind in (Attention, MoE) for passed in range(3)],
    *[(kind, "extend", passed) for kind in (Recent, Rows) for passed in (0, 2)],
    *[(Compressor, "__call__", 1), (Indexer, "extend", 0), (HyperHead, "__call__", 0)],
    *[(DecodeState, "finish", 0), (DecodeState, "finish", 1)],
]


@pytest.mark.parametrize(("kind", "name", "passed"), SITES)
@pytest.mark.parametrize("before", [131, 255])
def test_a_call_that_fails_anywhere_leaves_the_states_as_they_were(
    small_model, monkeypatch, kind, name, passed, before
):
    """Two sequences: one decodes, the other needs new buffers and rows and passes a boundary."""
    states = [state_after(small_model, before), state_after(small_model, 3)]
    kept, usual = [bits(state) for state in states], getattr(kind, name)
    for error in (MemoryError, KeyboardInterrupt):
        calls = []

        def failing(*arguments, error=error, calls=calls):
            out = usual(*arguments)
            calls.append(name)
            if len(calls) > passed:
                raise error
            return out

        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(kind, name, failing)
            small_model([IDS[before : before + 200], IDS[3:4]], cache=states)
        assert [state.offset for state in states] == [before, 3]
        assert [bits(state) for state in states] == kept
    straight, following = state_after(small_model, before), IDS[before : before + 5]
    want = run(small_model, following, straight)
    assert np.array_equal(run(small_model, following, states[0]), want)
    assert bits(states[0]) == bits(straight)
