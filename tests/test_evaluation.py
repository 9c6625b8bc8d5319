"""Perplexity, KL divergence and saved logits against plain NumPy, and what rows are hidden."""

import math
import random
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from reference import kl, log_softmax, run

from ds4mlx import DataError
from ds4mlx.engine.load import load
from ds4mlx.evaluation import agreement, perplexity, scoring
from ds4mlx.evaluation.held_out import filler_of, held_out_texts
from ds4mlx.evaluation.logits_file import LogitsFile, write_logits
from ds4mlx.evaluation.masking import hidden_rows
from ds4mlx.evaluation.scoring import Mean
from ds4mlx.evaluation.strawmen import affine
from ds4mlx.evaluation.weights import decode_weights

BOS = 0


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(3).integers(0, 288, 700).tolist()


def losses(model, ids):
    """Nats of each token but the first, by NumPy."""
    logits = log_softmax(run(model, ids))[:-1]
    return -logits[np.arange(len(ids) - 1), ids[1:]]


def test_means():
    assert Mean.of([]) == Mean(0.0, 0.0, 0)
    assert Mean.of([3.0]) == Mean(3.0, 0.0, 1)
    found = Mean.of([1.0, 2.0, 3.0, 6.0])
    assert found.value == 3 and found.standard_error == pytest.approx(math.sqrt(14 / 3 / 4))


def test_target_scores_are_those_of_whole_logits(small_model, text, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS", 288 * 7)  # seven rows at a time
    scores, leads = scoring.target_scores(small_model, text[:200], step=64)
    assert np.abs(-scores - losses(small_model, text[:200])).max() < 1e-4
    whole = run(small_model, text[:200]).argmax(-1)[:-1]
    assert (leads == (whole == np.array(text[1:200]))).all()


def test_one_token_has_nothing_to_score(small_model):
    scores, leads = scoring.target_scores(small_model, [5])
    assert scores.shape == leads.shape == (0,)


def test_a_short_text_is_read_once(small_model, text):
    found = perplexity.perplexity(small_model, text[:90], BOS, context=128)
    want = losses(small_model, [BOS, *text[:90]])
    assert not found.same_text and found.tokens == 90
    assert found.perplexity == pytest.approx(math.exp(want.mean()), rel=1e-5)
    assert [(d.first, d.end) for d in found.depths] == [(0, 23), (23, 46), (46, 69), (69, 90)]
    for depth in found.depths:
        part = want[depth.first : depth.end]
        assert depth.perplexity == pytest.approx(math.exp(part.mean()), rel=1e-5)
        assert depth.loss.count == len(part) and depth.rise.count == 0


def test_depths_of_a_long_text_hold_the_same_tokens(small_model, text):
    found = perplexity.perplexity(small_model, text, BOS, context=81, stretches=2)
    assert found.same_text and found.tokens == 40 and found.context == 81
    for number, depth in enumerate(found.depths):
        want = []
        for begin in (60, 680):  # the first place with all depths before it, and the last
            window = [BOS, *text[begin - 20 * number : begin + 20]]
            want.append(losses(small_model, window)[20 * number :])
        assert (depth.first, depth.end) == (20 * number, 20 * number + 20)
        assert depth.loss.value == pytest.approx(np.concatenate(want).mean(), rel=1e-5)
        if number:
            rise = np.concatenate(want).mean() - found.depths[number - 1].loss.value
            assert depth.rise.value == pytest.approx(rise, abs=1e-5)


@pytest.mark.parametrize(("length", "width", "most"), [(84, 20, 2), (80, 20, 3), (1000, 20, 5)])
def test_windows_fit_the_text(length, width, most):
    plan = perplexity.windows(length, width, most)
    assert 1 <= len(plan) <= most
    for stretch in plan:
        for number, window in enumerate(stretch):
            assert 0 <= window.start == window.scored - number * width
            assert window.end == window.scored + width <= length
    scored = [stretch[0].scored for stretch in plan]
    assert all(b - a >= width for a, b in pairwise(scored))


def test_divergence_is_that_of_numpy():
    rng = np.random.default_rng(1)
    a, b = (rng.normal(0, 3, (5, 40)).astype(np.float32) for _ in range(2))
    b[3] = a[3]
    a[4, :7] = -np.inf  # excluded by the reference: no part in the sum
    found, same = agreement.divergence(mx.array(a), mx.array(b))
    p, q = log_softmax(a), log_softmax(b)
    want = np.where(np.isinf(p), 0, np.exp(p) * (np.where(np.isinf(p), 0, p) - q)).sum(-1)
    assert np.abs(found - want).max() < 1e-5 and found[3] == 0
    assert (same == (a.argmax(-1) == b.argmax(-1))).all()


def test_agreement_with_a_model_and_with_its_saved_logits(
    small_dir, small_model, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "LOGITS", 288 * 50)
    plain, _ = load(small_dir, dtype=mx.float32, rounding="none")
    sequences = agreement.spread_sequences(text, BOS, 150, most=2)
    assert [len(s) for s in sequences] == [150, 150] and sequences[1][-1] == text[-1]
    found = agreement.with_model(small_model, plain, sequences, "plain")
    pairs = [(run(plain, ids), run(small_model, ids)) for ids in sequences]
    want = np.concatenate([kl(theirs, ours) for theirs, ours in pairs])
    same = np.concatenate([t.argmax(-1) == o.argmax(-1) for t, o in pairs])
    assert found.kl.count == 300 and found.kl.value == pytest.approx(want.mean(), rel=1e-3)
    assert found.kl_largest == pytest.approx(want.max(), rel=1e-3)
    assert found.top1.value == same.mean()

    file = tmp_path / "plain.safetensors"
    agreement.save_logits(plain, sequences, file)
    assert not list(tmp_path.glob("*.partial"))
    (saved,) = agreement.with_file(small_model, file)
    assert saved.kl == found.kl and saved.top1 == found.top1
    (own,) = agreement.with_file(plain, file)
    assert own.kl.value == own.kl_largest == 0 and own.top1.value == 1


def test_a_file_of_several_models_logits(small_model, text, tmp_path):
    logits = run(small_model, text[:40])
    noisy = logits + np.random.default_rng(0).normal(0, 0.5, logits.shape).astype(np.float32)
    file = tmp_path / "two.safetensors"
    arrays = {
        "tokens": mx.array(text[:40]),
        "ours.logits": mx.array(logits),
        "noisy.logits": mx.array(noisy).astype(mx.bfloat16),
        "half.logits": mx.array(logits).astype(mx.float16),
    }
    mx.save_safetensors(str(file), arrays)
    found = {a.reference.rpartition(": ")[2]: a for a in agreement.with_file(small_model, file)}
    assert found["ours.logits"].kl.value < 1e-6
    assert found["half.logits"].kl.value < 1e-4
    rounded = np.array(arrays["noisy.logits"].astype(mx.float32))
    want = kl(rounded, logits).mean()
    assert found["noisy.logits"].kl.value == pytest.approx(want, rel=1e-3)


def test_what_is_no_file_of_logits(small_model, tmp_path):
    def refused(arrays, message):
        file = tmp_path / "bad.safetensors"
        mx.save_safetensors(str(file), arrays)
        with pytest.raises(DataError, match=message) as error:
            agreement.with_file(small_model, file)
        assert str(file) in str(error.value)

    tokens, logits = mx.arange(6), mx.zeros((6, 288))
    refused({"logits": logits}, "tensor tokens is missing")
    refused({"tokens": tokens}, "holds no tensor called logits")
    refused({"tokens": logits, "logits": logits}, "expected integers")
    refused({"tokens": tokens, "logits": logits[:5]}, "expected floats")
    refused({"tokens": tokens, "logits": mx.zeros((6, 288), mx.int32)}, "expected floats")
    refused({"tokens": tokens, "logits": mx.zeros((6, 300))}, "300 logits a token")
    refused({"tokens": tokens + 300, "logits": logits}, "outside the vocabulary of 288")
    refused({"tokens": tokens, "logits": logits + mx.inf}, "not all finite")


def test_an_unfinished_file_of_logits_leaves_nothing(tmp_path):
    def blocks():
        yield mx.zeros((2, 5))
        raise KeyboardInterrupt

    file = tmp_path / "logits.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_logits(file, [[1, 2, 3]], 5, blocks())
    assert not list(tmp_path.iterdir())
    write_logits(file, [[1, 2, 3]], 5, [mx.zeros((2, 5)), mx.ones((1, 5))])
    saved = LogitsFile(file)
    assert saved.tokens.tolist() == [[1, 2, 3]] and saved.names == ["logits"]
    assert saved.rows("logits", 0, 1, 2).tolist() == [[0] * 5, [1] * 5]


def test_hidden_rows_change_what_is_beyond_the_window(small_model, text):
    """CSA rows count from the first whole group on; HCA rows from token 128 on."""
    usual = run(small_model, text[:200])
    changed = {}
    for kind in ("CSA", "HCA"):
        with hidden_rows(small_model, kind):
            changed[kind] = np.abs(run(small_model, text[:200]) - usual).max(-1) > 1e-4
    assert not changed["CSA"][:3].any() and changed["CSA"][20:].mean() > 0.9
    assert not changed["HCA"][:127].any() and changed["HCA"][127:].mean() > 0.9
    assert (run(small_model, text[:200]) == usual).all()


def test_hidden_rows_come_back_after_an_error(small_model, text):
    usual = run(small_model, text[:64])
    with pytest.raises(KeyError), hidden_rows(small_model, "CSA"):
        raise KeyError
    assert (run(small_model, text[:64]) == usual).all()


def test_decoded_weights_give_the_same_logits(small_dir, small_model, text):
    decoded, _ = load(small_dir, dtype=mx.float32)
    decode_weights(decoded)
    assert decoded.layers[0].attn.wkv.format == "f32"
    assert kl(run(small_model, text[:150]), run(decoded, text[:150])).mean() < 1e-5


def test_affine_two_bits_have_four_levels():
    values = mx.array(np.random.default_rng(2).normal(size=(3, 128)).astype(np.float32))
    found = np.array(affine(values)).reshape(-1, 64)
    assert all(len(np.unique(group)) <= 4 for group in found)
    assert np.abs(found - np.array(values).reshape(-1, 64)).max() < 2
    assert (np.array(affine(mx.array(found.reshape(3, 128)))) == found.reshape(3, 128)).mean() > 0.9


def test_filler_is_held_out_text():
    filler, rng = filler_of(held_out_texts(), 300), random.Random(0)
    piece = filler(rng).strip("\n")
    assert any(piece in text for text in held_out_texts())
