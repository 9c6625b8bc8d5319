"""Prompts and decoding against the references: on a GPU by kernels, on a CPU by their plain bodies.

On the CPU a few tokens also run as the very text that Metal compiles.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import make_checkpoint
import mlx.core as mx
import numpy as np
import pytest
from reference import run, run_chunks
from spoiling import executor_only, on_metal

from ds4mlx import Model, load
from ds4mlx.convert import convert
from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.custom_kernels.graph import kinds
from ds4mlx.custom_kernels.recording import recording
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.model.block import Block
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
IDS = np.random.default_rng(8).integers(0, 288, 2064)
BOUND, ALONE = 1e-4, 1e-5
# What a step by kernels has none of.
PLAIN = {"Matmul", "QuantizedMatmul", "GatherMM", "GatherQMM", "Softmax", "ArgSort", "ArgPartition"}
needs_gpu = pytest.mark.skipif(dialect.target() is None, reason="without a GPU prompts are plain")


class Tiny(NamedTuple):
    """A sequence of the tiny checkpoint, and its logits by the official code, without rounding."""

    ids: np.ndarray
    logits: np.ndarray


@pytest.fixture
def tiny(stored):
    return Tiny(stored["s700/ids"], stored["s700/exact/logits"])


class Heads(NamedTuple):
    """A model with Flash's head sizes, the same that reads fast, and a text with its logits by modules."""

    model: Model
    reader: Model
    ids: np.ndarray
    logits: np.ndarray


@pytest.fixture(scope="module")
def heads_dir(shared):
    source = shared(
        "heads/official", lambda path: make_checkpoint.make(str(path), 5, "tiny", HEADS)
    )
    return shared("heads/converted", lambda path: convert(source, path, progress=False))


@pytest.fixture(scope="module")
def heads(heads_dir):
    model, reader = (load(heads_dir, dtype=mx.float32, rounding="none")[0] for _ in range(2))
    decode_weights(reader)
    return Heads(model, reader, IDS, run(reader, IDS))


def stepped(model, ids, states: list[DecodeState], count: int) -> np.ndarray:
    """Logits (count, B, vocab) of the next tokens of sequences that are at their states' offsets.

    By launches alone, every block of them; on a GPU by kernels.
    """
    assert not by_modules(model.layers), "every block goes through launches"
    rows = []
    with launches(), no_modules():
        for _ in range(count):
            tokens = [int(ids[state.offset]) for state in states]
            logits = model.step(mx.array(tokens), states)
            if dialect.target() is not None:
                assert not PLAIN & kinds(logits).keys()
            rows.append(np.array(logits))
    return np.stack(rows)


@contextlib.contextmanager
def no_modules() -> Iterator[None]:
    """Inside the block no block of a model may be computed by its modules."""
    with pytest.MonkeyPatch.context() as patch:
        for half in ("attended", "fed"):
            patch.setattr(Block, half, lambda self, *_: pytest.fail(f"modules of {self._site}"))
        yield


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
        alone = stepped(model, ids, [after(reader, ids, depth)], count)[:, 0]
        assert np.abs(together[:, number] - alone).max() <= ALONE * np.abs(alone).max()


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


@pytest.mark.parametrize("depths", [(), (130, 5), (2047, 0, 63, 127, 128, 300, 511)])
def test_flashs_head_sizes_where_rows_are_selected(heads, depths):
    """One sequence that goes beyond 2,048 tokens, where 512 of more rows are kept, and others beside it."""
    count = 9 if depths else 14
    assert_as_wanted(*heads, (2056 - count, *depths), count)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("target", ["metal", "cuda"])
def test_a_step_of_these_sizes_is_kernels(exact_model, decoded_model, heads, count, target):
    """Nothing that a kernel is for is left to MLX's own operations; noted, on any machine."""
    for model, reader in ((exact_model, decoded_model), (heads.model, heads.reader)):
        states = [after(reader, IDS, 5 * n) for n in range(count)]
        stepped(model, IDS, states, 1)
        with recording(target) as launched, launches(), no_modules():
            logits = model.step(mx.zeros((count,), mx.int32), states)
        assert len(launched) >= 10 * len(model.layers)
        assert kinds(logits).keys() <= {"Full", "Gather", "AsType", "Concatenate"}


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
