"""The step by launches gives what the modules give, in every mixture of ways to move a state on."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference import run

from ds4mlx import load
from ds4mlx.model.fused.choice import by_modules, launches
from ds4mlx.model.taps import Listener, listening
from ds4mlx.state import buffers, tails
from ds4mlx.state.boundaries import Spacing
from ds4mlx.state.buffers import SPAN

IDS = np.random.default_rng(5).integers(0, 288, 1500)
MOST = 520
BOUND = 3e-5  # of logits of about 4


@pytest.fixture(scope="session")
def exact(small_dir):
    """The small model in float32 without rounding, whose noise no code can enlarge."""
    model = load(small_dir, dtype=mx.float32, rounding="none")[0]
    assert not by_modules(model.layers)
    return model


@pytest.fixture(scope="session")
def wanted(exact):
    """Logits after each of the tokens, by modules."""
    return run(exact, IDS[:MOST])


def step(model, states, tokens):
    """Logits of a token of each state, by launches."""
    with launches():
        return np.array(model.step(mx.array(tokens), states))


def assert_steps(model, state, count, wanted):
    for _ in range(count):
        at = state.offset
        error = np.abs(step(model, [state], [int(IDS[at])])[0] - wanted[at]).max()
        assert error <= BOUND, f"token {at}"


def test_from_the_first_token_across_rows_of_both_kinds(exact, wanted):
    state = exact.make_cache()
    assert_steps(exact, state, 140, wanted)
    assert state.offset == 140


@settings(max_examples=8, phases=[Phase.generate])
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("step"), st.integers(1, 70)),
            st.tuples(st.just("modules"), st.integers(1, 6)),
            st.tuples(st.just("chunk"), st.integers(1, 150)),
            st.tuples(st.just("back"), st.integers(1, 128)),
        ),
        min_size=2,
        max_size=8,
    )
)
def test_every_mixture_of_steps_chunks_and_ways_back(exact, wanted, moves):
    state, far = exact.make_cache(), 0
    for move, count in moves:
        count = min(count, MOST - state.offset)
        if move == "step":
            assert_steps(exact, state, min(count, 2 * SPAN), wanted)
        elif move == "back":
            # The last 128 lengths are always to be reached.
            state.rewind(max(0, state.offset - count))
        elif count:
            size = count if move == "chunk" else 1
            while count > 0:
                at = state.offset
                got = run(exact, IDS[at : at + size], state)
                assert np.abs(got - wanted[at : at + size]).max() <= BOUND
                count -= size
        far = max(far, state.offset)
    assert_steps(exact, state, min(2, MOST - state.offset), wanted)


def test_several_sequences_at_their_own_depths(exact, wanted):
    """Each is what it is alone, also where one joins and another leaves."""
    states = [exact.make_cache() for _ in range(3)]
    for state, depth in zip(states, (0, 127, 300), strict=True):
        if depth:
            run(exact, IDS[:depth], state)
    for turn in range(40):
        here = states[turn // 30 :] if turn % 7 else states[:2]
        offsets = [state.offset for state in here]
        got = step(exact, here, [int(IDS[at]) for at in offsets])
        for logits, at in zip(got, offsets, strict=True):
            assert np.abs(logits - wanted[at]).max() <= BOUND


def test_records_and_rewinds_are_those_of_the_modules(exact):
    """Boundaries that steps pass are recorded, and can be gone back to however far behind."""
    pair = [exact.make_cache() for _ in range(2)]
    for number, state in enumerate(pair):
        state.boundaries.spacing = Spacing(64, 1024, 1024)
        state.add_boundary(100)
        run(exact, IDS[:90], state)
        for at in range(90, 200):
            if number:
                step(exact, [state], [int(IDS[at])])
            else:
                run(exact, IDS[at : at + 1], state)
    modules, fused = pair
    assert list(modules.records) == list(fused.records) == [64, 100, 128, 192]
    for position in modules.records:
        sides = [np.array(s.record(position)).view(np.float32) for s in pair]
        assert np.allclose(*sides, atol=1e-5, equal_nan=True)
    for state in pair:
        state.rewind(100)
    sides = [run(exact, IDS[100:140], state) for state in pair]
    assert np.abs(sides[0] - sides[1]).max() <= BOUND


def test_full_tails_move_into_their_buffers(exact, monkeypatch):
    """More rows than a tail takes; what every token makes moves up often, and is not copied else."""
    monkeypatch.setattr(buffers, "TAIL", 16)
    state = exact.make_cache()
    run(exact, IDS[:6], state)
    part = state[1].compressors[0]
    with launches():
        for at in range(6, 6 + 4 * 16 + 8):
            kept = part.rows.buffer
            mx.eval(exact.step(mx.array([int(IDS[at])]), [state]))
            if part.rows.count - part.rows.settled not in (0, 1, 16):
                assert part.rows.buffer is kept
    assert part.rows.settled == 16 + 1 and part.rows.count == state.offset // 4
    with launches(False):
        got = run(exact, IDS[state.offset :][:1], state)
    whole = run(exact, IDS[: state.offset])[-1:]
    assert np.abs(got - whole).max() <= BOUND


def test_a_state_in_tails_is_as_large_as_it_says(exact):
    state = exact.make_cache()
    run(exact, IDS[:200], state)
    step(exact, [state], [1])
    assert state.nbytes == sum(a.nbytes for a in state.arrays)
    assert all(part.tail is not None for layer in state for part in layer.recents)
    assert tails.place(state, 3)[:5] == [201, 200, 50, 1, 3]


class Ears(Listener):
    """Hears one quantity."""

    def __init__(self, name):
        self.name, self.heard = name, []

    def wants(self, name):
        return name == self.name

    def take(self, name, value, span):
        self.heard.append(value)
        return value


@pytest.mark.parametrize("name", ["layers.1.attn.indexer.scores", "layers.2.ffn.out", "head.in"])
def test_who_listens_hears_what_the_modules_make(exact, wanted, name):
    state, ears = exact.make_cache(), Ears(name)
    run(exact, IDS[:60], state)
    for turn in range(3):
        with listening(ears):
            at = state.offset
            got = step(exact, [state], [int(IDS[at])])
            assert np.abs(got[0] - wanted[at]).max() <= BOUND
            assert len(ears.heard) == turn + 1
        assert_steps(exact, state, 2, wanted)


def test_an_error_leaves_the_states_as_they_were(exact, wanted, monkeypatch):
    state = exact.make_cache()
    run(exact, IDS[:30], state)
    assert_steps(exact, state, 3, wanted)
    monkeypatch.setattr("ds4mlx.model.fused.layers.head_in", lambda *a, **k: 1 / 0)
    with launches(), pytest.raises(ZeroDivisionError):
        exact.step(mx.array([5]), [state])
    monkeypatch.undo()
    assert state.offset == 33
    assert_steps(exact, state, 3, wanted)
