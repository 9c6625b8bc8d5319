"""What is traced of a step, and when: with launches that make nothing, at Flash's sizes, on any machine."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from test_step_launches import after, flash

from ds4mlx import load
from ds4mlx.custom_kernels import dialect, dispatch, self_check
from ds4mlx.model.fused import step, traced
from ds4mlx.model.fused.traced import SETS, Traces
from ds4mlx.research import Steering

LAYERS = 4


class Nothing:
    """Launches that give zeros, and are counted by kernel. Unlike recorded ones, what they give hangs on
    nothing: so that a state can be settled, and no weight is made for it."""

    target = "metal"

    def __init__(self):
        self.names: Counter[str] = Counter()

    def launch(self, kernel, inputs, outputs, groups, threads, template, reads):
        self.names[kernel.name] += 1
        return [mx.zeros(tuple(shape), dtype) for shape, dtype in outputs]


@pytest.fixture(scope="module")
def model():
    return flash("q2", layers=LAYERS)


@pytest.fixture
def launched(model, monkeypatch):
    """The launches of steps that are traced although something else than MLX launches."""
    nothing, model._traced = Nothing(), Traces()
    monkeypatch.setattr(step, "_traceable", lambda kept: not kept.failed)
    with dialect.launching(nothing), dispatch.kernels():
        yield nothing.names


def stepped(model, states) -> int:
    """Launches that one more token of some states asks for in Python."""
    names = dialect.launcher().names
    before = names.total()
    model.step(mx.zeros((len(states),), mx.int32), states)
    return names.total() - before


def test_a_step_is_traced_once_and_replayed(model, launched):
    state = after(model, 4096)
    assert stepped(model, [state]) > 10 * LAYERS
    # Where rows of both ratios are completed, and tails are full and move up.
    assert [stepped(model, [state]) for _ in range(70)] == [0] * 70
    assert state.offset == 4096 + 71


def test_a_state_of_another_size_is_another_trace(model, launched):
    assert stepped(model, [after(model, 4096)]) > 0
    assert stepped(model, [after(model, 40_960)]) > 0
    assert stepped(model, [after(model, 4097)]) == 0
    assert stepped(model, [after(model, 4096), after(model, 40_960)]) > 0
    assert stepped(model, [after(model, 40_961)]) == 0


def test_as_many_traces_as_are_kept(model, launched, monkeypatch):
    monkeypatch.setattr(traced, "MOST", 3)
    states = [after(model, 4096 * n) for n in range(2, 9)]
    for state in states:
        assert stepped(model, [state]) > 0
        assert len(model._traced.of(model, ())._made) <= 4
    assert stepped(model, [states[-1]]) == 0
    assert stepped(model, [states[0]]) > 0


def test_another_weight_is_another_trace(model, launched):
    state = after(model, 4096)
    stepped(model, [state])
    assert stepped(model, [state]) == 0
    model.layers[1].attn.attn_sink = model.layers[1].attn.attn_sink
    assert stepped(model, [state]) > 0


@pytest.mark.parametrize("site", ["ffn.out", "attn.out", "streams", "hc_ffn.streams"])
def test_steering_is_traced_with_the_step(model, launched, site):
    state, direction = after(model, 4096), np.ones(model.args.hidden_size, np.float32)
    whole = stepped(model, [state])
    with model.steer(Steering("project", site, dict.fromkeys(range(LAYERS), direction))):
        # For every layer the streams or the sublayer's output, and mixes of what comes of them.
        assert stepped(model, [state]) == whole + LAYERS
        assert [stepped(model, [state]) for _ in range(3)] == [0] * 3
    assert stepped(model, [state]) == 0


def test_steered_and_plain_steps_in_turn_stay_traced(model, launched):
    """For some steerings at a time, and never with weights that the model has no more."""
    state, direction = after(model, 4096), np.ones(model.args.hidden_size, np.float32)
    how = [Steering("add", "ffn.out", {n: direction}) for n in range(LAYERS)]
    counts = []
    for _ in range(2):
        counts.append(stepped(model, [state]))
        with model.steer(how[0]):
            counts.append(stepped(model, [state]))
            with model.trace("logits"):
                stepped(model, [state])
    assert counts[0] > 0 and counts[1] > 0 and counts[2:] == [0, 0]
    for each in how[1:]:
        with model.steer(each):
            assert stepped(model, [state]) > 0
    assert len(model._traced._sets) == SETS
    model.layers[1].attn.attn_sink = model.layers[1].attn.attn_sink
    stepped(model, [state])
    assert len(model._traced._sets) == 1


def test_a_steering_of_another_model_is_none_of_this_one(model, launched):
    other, state = flash("q2", layers=LAYERS), after(model, 4096)
    how = Steering("add", "ffn.out", {1: np.ones(model.args.hidden_size, np.float32)})
    whole = stepped(model, [state])
    with model.steer(how):
        assert stepped(model, [state]) == whole + 1
    with other.steer(how):
        assert stepped(model, [state]) == whole


def test_blocks_steered_alike_are_traced_beside_one_that_goes_through_its_modules(model, launched):
    state, direction = after(model, 4096), np.ones(model.args.hidden_size, np.float32)
    everywhere = dict.fromkeys(range(LAYERS), direction)
    with (
        model.steer(Steering("add", "ffn.out", everywhere)),
        model.steer(Steering("add", "ffn.in", {0: direction})),
    ):
        first, again = stepped(model, [state]), stepped(model, [state])
    assert first - again > 10 * (LAYERS - 1)


@pytest.mark.parametrize("heard", ["ffn.in", "ffn.out"])
def test_blocks_that_nobody_hears_are_traced(model, launched, heard):
    """Beside one that goes through its modules, or through launches of which somebody hears."""
    state = after(model, 4096)
    whole = stepped(model, [state])
    with model.intervene({f"layers.2.{heard}": lambda value, where: value}):
        first, again = stepped(model, [state]), stepped(model, [state])
    assert again > 0 and first - again > whole / 2
    with model.trace(f"layers.2.{heard}"):
        assert 0 < stepped(model, [state]) < whole
    if heard == "ffn.out":  # modules leave a state whose rows lie otherwise
        assert stepped(model, [state]) == 0


def test_what_mlx_cannot_trace_is_done_without(small_dir, monkeypatch):
    """Where not one kernel is good, a step has more plain operations than MLX can compile at once."""
    model = load(small_dir, dtype=mx.float32, rounding="none")[0]
    state, ids = model.make_cache(), mx.array([[1, 2, 3, 4]])
    want = np.array(model(mx.array([[1, 2, 3, 4, 5]]))[0, -1])
    mx.eval(model(ids, state))
    monkeypatch.setattr(dialect, "target", lambda: "metal")
    monkeypatch.setattr(self_check, "good", lambda *_: False)
    monkeypatch.setattr(self_check, "check", lambda *_, **__: None)
    got = np.array(model.step([5], [state])[0])
    assert model._traced.of(model, ()).failed and state.offset == 5
    assert np.abs(got - want).max() <= 3e-5
