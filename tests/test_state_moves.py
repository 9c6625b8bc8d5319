"""Decode states that are moved in every way there is, step by step, chunk by chunk, back and apart."""

import contextlib
import random
from copy import deepcopy

import mlx.core as mx
import numpy as np
import pytest
from reference import run

from ds4mlx import load
from ds4mlx.model.fused.choice import launches
from ds4mlx.state import buffers
from ds4mlx.state.decode_state import RewindError

IDS = np.random.default_rng(5).integers(0, 288, 300)
TURNS, MOST = 40, 280


@pytest.fixture(scope="module")
def exact(small_dir):
    return load(small_dir, dtype=mx.float32, rounding="none")[0]


@pytest.fixture(scope="module")
def wanted(exact):
    """Logits of every token, and the rows of every compressor, of one chunk."""
    state = exact.make_cache()
    return run(exact, IDS, state), [part.rows.between(0, part.rows.count) for part in grown(state)]


def grown(state):
    return [part for layer in state for part in layer.compressors]


def stepped(exact, wanted, rnd, states):
    """A few tokens of several states together, which stand anywhere."""
    for _ in range(rnd.choice([1, 3, 9, 17])):
        places = [state.offset for state in states]
        if max(places) >= MOST:
            return
        with launches():
            got = np.array(exact.step(mx.array(IDS[places]), states))
        assert np.abs(got - wanted[places]).max() <= 5e-5


def read(exact, wanted, rnd, state):
    """A chunk, of which some tokens are taken back."""
    first = state.offset
    last = min(first + rnd.choice([1, 2, 3, 40, 130]), MOST)
    if first < last:
        got = run(exact, IDS[first:last], state)
        assert np.abs(got - wanted[first:last]).max() <= 5e-5
        state.rewind(rnd.choice([last, last, rnd.randint(first, last)]))


def interrupted(exact, rnd, state):
    """Ctrl-C while tails are moved into buffers, or before a tail takes its place."""
    place, name = rnd.choice(
        [(buffers.Rows, "settle"), (buffers.Recent, "settle"), (buffers.Recent, "moved_up")]
    )
    whole, left = getattr(place, name), [rnd.randint(1, 3)]

    def until_then(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch, launches():
        patch.setattr(place, name, until_then)
        with contextlib.suppress(KeyboardInterrupt):
            exact.step(mx.array(IDS[state.offset : state.offset + 1]), [state])


def moved(exact, wanted, rnd, states):
    """One move of one state, or of several."""
    state = rnd.choice(states)
    match rnd.choice(["step"] * 3 + ["read", "back", "far", "stop", "boundary", "share", "copy"]):
        case "step":
            stepped(exact, wanted, rnd, rnd.sample(states, rnd.randint(1, len(states))))
        case "read":
            read(exact, wanted, rnd, state)
        case "back":
            state.rewind(max(0, state.offset - rnd.choice([1, 2, 5, 30, 128])))
        case "far" if state.records:
            state.rewind(rnd.choice(list(state.records)))
        case "stop" if state.offset < MOST:
            interrupted(exact, rnd, state)
        case "boundary":
            state.add_boundary(state.offset + rnd.randint(1, 10))
        case "share":
            rnd.choice(states).share(state)
        case "copy":
            states[rnd.randrange(len(states))] = deepcopy(state)


def right(state, rows):
    """Whether a state holds what a state of so many tokens does, each array once."""
    for part, (want,) in zip(grown(state), rows, strict=True):
        count = state.offset // part.ratio
        assert part.rows.count == count
        for got, start in pieces(part.rows, count):
            np.testing.assert_allclose(got, want[start : start + len(got)], rtol=1e-4, atol=3e-5)
    arrays = state.arrays
    assert len({id(array) for array in arrays}) == len(arrays)


def pieces(rows, count):
    """Rows before the tail and in it, each with the number of its first."""
    first = 0
    for piece in rows.between(0, count):
        yield piece, first
        first += len(piece)


@pytest.mark.parametrize("seed", range(3))
def test_a_state_is_the_same_whichever_way_it_came(exact, wanted, seed, monkeypatch):
    """With tails so short that they are full all the time."""
    monkeypatch.setattr(buffers, "SPAN", 8)
    monkeypatch.setattr(buffers, "TAIL", 3)
    rnd, (logits, rows) = random.Random(seed), wanted
    states = [exact.make_cache() for _ in range(3)]
    for _ in range(TURNS):
        try:
            moved(exact, logits, rnd, states)
        except RewindError as error:
            assert error.nearest <= MOST
        for state in states:
            right(state, rows)
