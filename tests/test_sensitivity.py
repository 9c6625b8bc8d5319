"""Sensitivities: how they are measured, and files of them that are refused."""

import json
from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from ds4mlx import DataError
from ds4mlx.cli.main import run
from ds4mlx.convert.choice import ROLES
from ds4mlx.convert.sensitivity import Sensitivity
from ds4mlx.evaluation import sensitivity
from ds4mlx.evaluation.scoring import logit_blocks
from ds4mlx.evaluation.sensitivity import NOISE, Noisy, noise, sensitivities

LAYERS = 3

IDS = list(range(3, 40))


def given(model):
    """Inputs of the first expert of the first layer."""
    columns = model.layers[0].ffn.experts.w1.shape[-1]
    x = mx.random.normal((200, 1, 1, columns), key=mx.random.key(3))
    return x, mx.zeros((200, 1), mx.int32)


def test_the_noise_is_as_large_as_it_is_said_to_be(stored_model):
    stack, (x, experts) = stored_model.layers[0].ffn.experts.w1, given(stored_model)
    exact, noisy = np.array(stack(x, experts)), np.array(Noisy(stack, 1)(x, experts))
    found = np.square(noisy - exact).sum() / np.square(exact).sum()
    assert found == pytest.approx(NOISE, rel=0.1)


def test_gate_and_up_have_noise_of_their_own(stored_model):
    parts, (x, experts) = stored_model.layers[0].ffn.experts, given(stored_model)
    exact = [np.array(getattr(parts, part)(x, experts)) for part in ("w1", "w3")]
    with noise(stored_model, (0, "gate_up")):
        noisy = [np.array(getattr(parts, part)(x, experts)) for part in ("w1", "w3")]
    gaps = [(a - b).ravel() for a, b in zip(noisy, exact, strict=True)]
    assert abs(np.corrcoef(*gaps)[0, 1]) < 0.1


def test_it_is_only_where_and_while_it_should_be(small_model):
    def logits():
        return np.concatenate([np.array(each) for _, each in logit_blocks(small_model, IDS)])

    before = logits()
    with noise(small_model, (1, "down")):
        inside, parts = logits(), small_model.layers[1].ffn.experts
        assert isinstance(parts.w2, Noisy) and not isinstance(parts.w1, Noisy)
    assert not np.array_equal(inside, before) and np.array_equal(logits(), before)


def test_every_place_matters(small_model):
    found = sensitivities(small_model, [IDS, IDS[:9]])
    assert [*found] == [*product(range(LAYERS), ROLES)]
    for mean in found.values():
        assert mean.value > 0 and mean.count == len(IDS) + 9
    again = sensitivities(small_model, [IDS, IDS[:9]])
    assert again == found


def test_they_are_in_nats_for_an_error_of_1_however_large_the_noise(small_model, monkeypatch):
    """In the last layer, behind which nothing else is rounded, a hundredth of it does a hundredth."""
    found = []
    for size in (1e-3, 1e-5):
        monkeypatch.setattr(sensitivity, "NOISE", size)
        means = sensitivities(small_model, [IDS])
        found.append([means[LAYERS - 1, role].value for role in ROLES])
    np.testing.assert_allclose(*found, rtol=0.1)


def test_the_command(embedded_dir, tmp_path):
    """It writes through a link, as other commands do, and never over the text."""
    text, link = tmp_path / "text.txt", tmp_path / "link"
    text.write_text("What matters is measured. " * 4)
    link.symlink_to(tmp_path / "steep")
    words = ["sensitivity", "-m", str(embedded_dir), "--prompts", str(text), "--max-tokens", "12"]
    assert run([*words, "-o", str(link)]) == 0 and link.is_symlink()
    found = Sensitivity.read(tmp_path / "steep", 5)
    assert len(found.nats) == 10 and found.fingerprint
    assert run([*words, "-o", str(text)]) == 2 and text.read_text().startswith("What")


# Refusing


def steep(content):
    return json.dumps({"kind": "ds4mlx sensitivity 1", **content})


ONE = {role: {"nats": 1.0} for role in ROLES}
WRONG = {
    "no JSON": ("{", "is no file of sensitivities"),
    "another kind": (json.dumps({"kind": "x", "layers": [ONE] * LAYERS}), "is no file of"),
    "a layer too few": (
        steep({"layers": [ONE] * (LAYERS - 1)}),
        "is of a model with 2 layers, not 3",
    ),
    "no down": (steep({"layers": [{"gate_up": {"nats": 1}}] * LAYERS}), "is no file of"),
    "nothing matters": (steep({"layers": [{**ONE, "down": {"nats": 0}}] * LAYERS}), "is no file"),
    "not finite": (steep({"layers": [{**ONE, "down": {"nats": "nan"}}] * LAYERS}), "is no file"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_sensitivities_that_are_refused(tmp_path, kind):
    text, why = WRONG[kind]
    (tmp_path / "steep").write_text(text)
    with pytest.raises(DataError, match=f"steep: {why}"):
        Sensitivity.read(tmp_path / "steep", LAYERS)
