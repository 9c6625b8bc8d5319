"""The forward pass against the reference outputs of the official computation."""

import mlx.core as mx
import numpy as np
import pytest
from reference import kl, manifest, run, run_chunks

from ds4mlx import load
from ds4mlx.evaluation.weights import decode_weights

EXACT = 1e-4
SEQUENCES = ["s129", "s700"]
SLOW = pytest.mark.slow
# A sequence, and between which of its tokens it goes on one by one.
STEPS = [
    ("s129", 0, 129),
    ("s700", 500, 530),
    *(pytest.param("s700", start, 700, marks=SLOW) for start in (300, 511)),
]


@pytest.fixture(scope="module")
def decoded_official(tiny_dir):
    """The official model's weights as plain values, for what takes many steps."""
    model = load(tiny_dir, dtype=mx.float32)[0]
    decode_weights(model)
    return model


def choose_lengths(seed: int, total: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(n) for n in rng.choice([1, 1, 2, 3, 4, 5, 17, 64, 127, 128, 130, 300], total)]


@pytest.mark.parametrize("name", SEQUENCES)
def test_exact_logits(exact_model, stored, name):
    want = stored[f"{name}/exact/logits"]
    got = run(exact_model, stored[f"{name}/ids"])
    assert np.abs(got - want).max() <= EXACT
    assert (got.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.parametrize("name", sorted(manifest()["prompts"].keys() - {"p700"}))
def test_every_prompt_is_a_prefix_of_its_sequence(decoded_model, stored, name):
    """Of p700 that is s700 itself, which is looked at above."""
    info = manifest()["prompts"][name]
    ids = stored[f"{info['sequence']}/ids"][: info["length"]]
    want = stored[f"{info['sequence']}/exact/logits"][: info["length"]]
    assert np.abs(run(decoded_model, ids) - want).max() <= EXACT


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=SLOW) for n in range(2, 6))])
def test_any_chunking_gives_the_same_logits(decoded_model, stored, seed):
    want = stored["s700/exact/logits"]
    got = run_chunks(decoded_model, stored["s700/ids"], choose_lengths(seed, 60))
    assert np.abs(got - want).max() <= EXACT
    assert (got.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.parametrize(("name", "start", "end"), STEPS)
def test_token_by_token_decode(decoded_model, stored, name, start, end):
    ids, want = stored[f"{name}/ids"][:end], stored[f"{name}/exact/logits"][:end]
    got = run_chunks(decoded_model, ids, [start] + [1] * (end - start))
    assert np.abs(got - want).max() <= EXACT
    assert (got.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.parametrize("decoded", [False, True])
def test_official_rounding(official_model, stored, decoded):
    want = stored["s129/kvsim/logits"].astype(np.float64)
    ids = stored["s129/ids"]
    got = run_chunks(official_model, ids, [90] + [1] * 39 if decoded else [])
    assert kl(want, got).mean() <= 1e-4
    assert (got.argmax(-1) == want.argmax(-1)).mean() >= 0.99
    assert np.abs(got - want).max() <= 0.2


def test_official_rounding_of_the_long_sequence(decoded_official, stored):
    rows, want = stored["s700/kvsim/rows"], stored["s700/kvsim/logits_rows"].astype(np.float64)
    whole = run(decoded_official, stored["s700/ids"])
    assert kl(want, whole[rows]).mean() <= 1e-4
    assert np.abs(whole[rows] - want).max() <= 0.2
    assert (whole.argmax(-1) == stored["s700/kvsim/top1"]).mean() >= 0.99


@pytest.mark.parametrize("mode", ["exact", "kvsim"])
def test_greedy_continuation(decoded_model, decoded_official, stored, mode):
    model = decoded_model if mode == "exact" else decoded_official
    want = stored[f"greedy/{mode}/ids"]
    cache, token, got = model.make_cache(), stored["s700/ids"][:300], []
    for _ in want:
        token = [int(run(model, token, cache)[-1].argmax())]
        got += token
    assert got == want.tolist()


def test_streams_and_rows_match_the_intermediates(decoded_model, stored):
    """Window, compressed and index rows of every layer, and the streams after the last."""
    cache, ids = decoded_model.make_cache(), stored["s700/ids"][:300]
    streams = decoded_model.streams(mx.array(ids.astype(np.int32))[None], cache)
    last = len(cache) - 1
    chosen = stored["p300/exact/selected_positions"].astype(np.int32)
    want = stored[f"p300/exact/streams.{last}"]
    assert np.abs(np.array(streams[0])[chosen] - want).max() < 2e-5 * np.abs(want).max()
    for i, layer in enumerate(cache):
        held = layer.window.end - layer.window.start
        rows = np.array(layer.window.buffer)[held - 4 : held]
        assert np.abs(rows - stored[f"p300/exact/window_kv.{i}"]).max() < 1e-4
        for part, name in zip(layer.compressors, ("compressed_kv", "index_kv"), strict=False):
            rows = np.array(part.rows.buffer)[: part.rows.count]
            want = stored[f"p300/exact/{name}.{i}"]
            assert rows.shape == want.shape
            assert np.abs(rows - want).max() < 1e-4


@pytest.mark.parametrize("mode", ["exact", "kvsim"])
@pytest.mark.parametrize("chunks", [[], [1, 7, 64, 1]])
def test_mtp_logits(decoded_model, decoded_official, stored, mode, chunks):
    model = decoded_model if mode == "exact" else decoded_official
    prompt = "p300" if mode == "exact" else "p129"
    ids = stored["s700/ids"][:300] if mode == "exact" else stored["s129/ids"]
    tokens = mx.array(ids.astype(np.int32))[None]
    state = model.make_cache()
    streams = model.streams(tokens, state)[:, :-1]
    rows, start = [], 0
    for length in [*chunks, len(ids) - 1 - sum(chunks)]:
        piece = slice(start, start + length)
        logits, _ = model.draft(streams[:, piece], tokens[:, 1:][:, piece], state)
        rows.append(np.array(logits[0]))
        start += length
    got = np.concatenate(rows)
    want = stored[f"{prompt}/{mode}/mtp_logits_tail"]
    assert np.abs(got[-len(want) :] - want).max() <= (EXACT if mode == "exact" else 0.2)
    assert (got.argmax(-1) == stored[f"{prompt}/{mode}/mtp_top1"]).mean() >= 0.99


def test_last_logits_are_the_last_of_the_call(decoded_model, stored):
    ids = mx.array(stored["s129/ids"].astype(np.int32))[None]
    last = decoded_model.last_logits(ids, decoded_model.make_cache())
    assert np.abs(np.array(last) - np.array(decoded_model(ids))[:, -1]).max() <= 5e-5


def test_bf16_stays_near_the_exact_model(tiny_dir, stored):
    """Statistically: on random weights bf16 flips choices, in the official code as well."""
    model, _ = load(tiny_dir)
    got = run(model, stored["s129/ids"])
    assert got.dtype == np.float32
    assert kl(stored["s129/kvsim/logits"].astype(np.float64), got).mean() < 0.1
