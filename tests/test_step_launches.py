"""What a decoded token launches at Flash's sizes, noted instead of launched: on any machine."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from ds4mlx.bench.costs import rows_read, weights_read
from ds4mlx.bench.synth import config_like, entries, format_of
from ds4mlx.custom_kernels.dialect import Target
from ds4mlx.custom_kernels.graph import operations
from ds4mlx.custom_kernels.layer.attention import SHARES
from ds4mlx.custom_kernels.recording import recording
from ds4mlx.engine.admission import StateMemory
from ds4mlx.model.fused.layers import begin
from ds4mlx.model.fused.step import _placed
from ds4mlx.model.linear import Matrix
from ds4mlx.model.model import Model
from ds4mlx.model.rope import step_angles
from ds4mlx.state.blank import fill_blank
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.rounding import Rounding
from ds4mlx.state.tails import settle


def flash(recipe: str, rounding: Rounding = "official", layers: int | None = None) -> Model:
    """A model of Flash's sizes, of all layers or the first so many, whose weights are never made."""
    config = config_like("flash", layers)
    model = Model(config, rounding=rounding)
    modules = dict(model.named_modules())
    for entry in entries(config):
        module, stored = modules[entry.module], format_of(recipe, entry, config)
        if isinstance(module, Matrix):
            module.store(stored)
        elif entry.kind == "plain":
            name = entry.name.rpartition(".")[2]
            module[name] = mx.zeros(entry.shape, mx.bfloat16)
    return model


def after(model: Model, tokens: int) -> DecodeState:
    """A state after so many tokens, whose rows are never made."""
    state = fill_blank(model.make_cache(), tokens)
    settle(state)
    for part in state.parts:  # without the graph that has settled them
        part.buffer = mx.zeros(part.arrays[0].shape, part.blank.dtype)
    return state


@pytest.fixture(scope="module")
def q2():
    return flash("q2")


def recorded(model, states, target: Target = "metal"):
    """Launches of the next step, and MLX's own operations around them, but for those that would make
    the weights and rows."""
    with recording(target) as launches:
        logits = model.step(mx.zeros((len(states),), mx.int32), states)
    return launches, [each for each in operations(logits) if each.name != "Full"]


@pytest.mark.parametrize("target", ["metal", "cuda"])
def test_at_most_twelve_launches_a_layer(q2, target):
    for tokens in (100, 4096, 1_000_000):
        launches, others = recorded(q2, [after(q2, tokens)], target)
        assert (len(launches) + len(others)) / len(q2.layers) <= 12


@pytest.mark.parametrize("tokens", [4096, 1_000_000])
def test_nothing_large_is_written(q2, tokens):
    """No more than a tail, the window, the logits, or 4 bytes an index row; but for the shares of the
    core attention, which are as large at any depth."""
    state = after(q2, tokens)
    launches, others = recorded(q2, [state])
    tails = [layer.window.tail.nbytes for layer in state]
    windows = [layer.window.arrays[0].nbytes for layer in state]
    grown = [part.rows for layer in state for part in layer.compressors]
    rows = [len(part.buffer) + part.room for part in grown]
    most = max(*tails, *windows, 4 * q2.args.vocab_size, 4 * max(rows))
    shares = [each for each in launches if each.name == "attention_share"]
    assert max(each.largest for each in (*launches, *others) if each not in shares) <= most
    heads = q2.args.num_attention_heads * q2.args.head_dim
    sums = 2 * q2.args.num_attention_heads
    assert {each.largest for each in shares} == {4 * SHARES * (heads + sums)}


def test_bytes_moved_are_those_of_the_weights(q2):
    """Each weight is read once, of the experts those chosen, and little besides."""
    launches, others = recorded(q2, [after(q2, 4096)])
    arithmetic = weights_read(q2, 1) + rows_read(q2, 4096)
    assert arithmetic <= sum(each.moved for each in (*launches, *others)) <= 1.15 * arithmetic


@pytest.mark.parametrize("position", [0, 4096, 1_048_575])
def test_what_every_launch_is_told_lies_side_by_side(q2, position):
    """MLX would copy anything else for every launch that takes it."""
    told = step_angles(q2._rotary, [position])
    assert memoryview(told).c_contiguous and told.dtype == mx.float32
    assert memoryview(begin(q2, mx.zeros((3,), mx.int32)).streams.view(mx.uint16)).c_contiguous


def test_of_one_token_the_host_writes_nothing(q2):
    """A GPU waits for what the host has just written: what a token is told is a view of what lies there."""
    places = [_placed([[4096 + n, 4000, 1000, 24, 0, 0, 0, 0]]) for n in range(2)]
    assert np.array(places[1]).tolist() == [[4097, 4000, 1000, 24, 0, 0, 0, 0]]
    angles = [step_angles(q2._rotary, [4096 + n]) for n in range(2)]
    assert apart(*places) == 4 * 8 and apart(*angles) == 4 * 4 * 2 * 32


def apart(first: mx.array, second: mx.array) -> int:
    """Bytes from where one array lies to where another does."""
    begins = [np.asarray(memoryview(each)).ctypes.data for each in (first, second)]
    return begins[1] - begins[0]


@pytest.mark.parametrize("target", ["metal", "cuda"])
def test_launches_of_several_sequences(q2, target):
    """One for all of them, but for what is added to states, which is one for four. What comes before
    and after both sublayers are launches of their own, where one sequence has them with products."""
    one, four, eight = (
        recorded(q2, [after(q2, 4096) for _ in range(n)], target)[0] for n in (1, 4, 8)
    )
    assert len(four) == len(one) + 4 * len(q2.layers)
    assert len(eight) == len(four) + len(q2.layers)
    names = [Counter(launch.name.partition("_x")[0] for launch in each) for each in (one, eight)]
    for name in ("hyper_in", "hyper_out", "hyper_out_two"):
        assert names[1][name] and not names[0][name]
    for name in ("attention_share", "index_scores_coded"):
        assert names[1][f"{name}_8"] == names[0][name] > 0
    for name in ("attention_merge", "index_select"):
        assert names[1][name] == names[0][name] > 0


def test_room_for_states_is_found_without_reading_weights(q2):
    """Which are 87 GB here, and were never made."""
    memory = StateMemory(q2, 65536, saving=False, budget=1 << 40)
    assert 0 < memory.needed(2048) < memory.needed(65536) < 1 << 30
