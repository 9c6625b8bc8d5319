"""Prompts and decoding against the references: on a GPU by kernels, on a CPU by their plain bodies.

On the CPU a few tokens also run as the very text that Metal compiles.
"""

from typing import NamedTuple

import make_checkpoint
import mlx.core as mx
import numpy as np
import pytest
from reference import run, run_chunks
from spoiling import executor_only, on_metal

from ds4mlx import load
from ds4mlx.convert import convert
from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.model.fused.choice import by_modules, launches
from ds4mlx.state.decode_state import DecodeState

# Flash's own head sizes, window and selection on a narrow trunk.
HEADS = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 0],
    "num_attention_heads": 2,
    "o_groups": 1,
    "head_dim": 512,
    "index_n_heads": 4,
    "index_topk": 512,
    "sliding_window": 128,
}
BOUND, ALONE = 1e-4, 1e-5
needs_gpu = pytest.mark.skipif(dialect.target() is None, reason="without a GPU prompts are plain")


class Tiny(NamedTuple):
    """A sequence of the tiny checkpoint, and its logits by the official code, without rounding."""

    ids: np.ndarray
    logits: np.ndarray


@pytest.fixture
def tiny(stored):
    return Tiny(stored["s700/ids"], stored["s700/exact/logits"])


@pytest.fixture(scope="module")
def heads_dir(shared):
    source = shared(
        "heads/official", lambda path: make_checkpoint.make(str(path), 5, "tiny", HEADS)
    )
    return shared("heads/converted", lambda path: convert(source, path, progress=False))


def stepped(model, ids, states: list[DecodeState], count: int) -> np.ndarray:
    """Logits (count, B, vocab) of the next tokens of sequences that are at their states' offsets."""
    assert not by_modules(model.layers), "every block goes through launches"
    rows = []
    with launches():
        for _ in range(count):
            tokens = [int(ids[state.offset]) for state in states]
            rows.append(np.array(model.step(mx.array(tokens), states)))
    return np.stack(rows)


def after(model, ids, depth: int) -> DecodeState:
    state = model.make_cache()
    if depth:
        run(model, ids[:depth], state)
    return state


def assert_as_wanted(model, reader, ids, wanted, depths, count) -> None:
    """Sequences at several depths together, each against the reference and against itself alone.

    reader: the same model, which reads what comes before.
    """
    together = stepped(model, ids, [after(reader, ids, d) for d in depths], count)
    for number, depth in enumerate(depths):
        want = wanted[depth : depth + count]
        assert np.abs(together[:, number] - want).max() <= BOUND
    alone = stepped(model, ids, [after(reader, ids, depths[-1])], count)
    assert np.abs(together[:, -1:] - alone).max() <= ALONE * np.abs(alone).max()


@needs_gpu
@pytest.mark.parametrize("lengths", [(), (131, 2, 64, 300)])
def test_prompts_of_tiny_as_the_oracle_says(exact_model, tiny, lengths):
    got = run_chunks(exact_model, tiny.ids, lengths)
    assert np.abs(got - tiny.logits).max() <= BOUND


@needs_gpu
@pytest.mark.parametrize("lengths", [(), (2051, 2, 9)])
def test_prompts_at_flashs_head_sizes(heads_dir, lengths, launched):
    """By the kernels of chunks, beside the modules; rows are selected in the end."""
    ids = np.random.default_rng(8).integers(0, 288, 2100)
    model = load(heads_dir, dtype=mx.float32, rounding="none")[0]
    with dispatch.kernels():
        got = run_chunks(model, ids, lengths)
    assert {"attention_chunk_f32", "chunk_scores_f32", "index_select"} <= launched.keys()
    with dispatch.plain_operations():
        want = run_chunks(model, ids, ())
    assert np.abs(got - want).max() <= BOUND


@pytest.mark.parametrize("depths", [(0,), (3, 130, 250), (0, 1, 5, 31, 64, 127, 128, 200)])
def test_tiny_as_the_oracle_says(exact_model, decoded_model, tiny, depths):
    assert_as_wanted(exact_model, decoded_model, tiny.ids, tiny.logits, depths, 6)


@pytest.mark.slow
def test_long_decoding_of_tiny(exact_model, tiny):
    count = 140
    got = stepped(exact_model, tiny.ids, [exact_model.make_cache()], count)[:, 0]
    assert np.abs(got - tiny.logits[:count]).max() <= BOUND


def test_flashs_head_sizes_where_rows_are_selected(heads_dir):
    """Beyond 2,048 tokens: 512 of more rows are kept."""
    model, reader = (load(heads_dir, dtype=mx.float32, rounding="none")[0] for _ in range(2))
    decode_weights(reader)
    ids = np.random.default_rng(8).integers(0, 288, 2064)
    state = reader.make_cache()
    wanted = run(reader, ids, state)
    state.rewind(2048 - 6)
    for got, want in zip(stepped(model, ids, [state], 14)[:, 0], wanted[-22:], strict=False):
        assert np.abs(got - want).max() <= BOUND


@executor_only
@pytest.mark.parametrize("rounding", ["none", "official"])
def test_a_token_as_metals_own_text(tiny_dir, tiny, rounding):
    """Beside the plain bodies; a token that completes rows of both kinds."""
    model = load(tiny_dir, dtype=mx.float32, rounding=rounding)[0]
    sides = []
    for metal in (True, False):
        state = after(model, tiny.ids, 127)
        if metal:
            with on_metal(), dispatch.kernels():
                sides.append(stepped(model, tiny.ids, [state], 2))
        else:
            sides.append(stepped(model, tiny.ids, [state], 2))
    assert np.abs(sides[0] - sides[1]).max() <= BOUND
