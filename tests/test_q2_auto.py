"""Formats chosen in a budget of bytes: what is chosen, how it is replayed, and what is refused."""

import json
import signal
import subprocess
import sys
from itertools import product

import dying
import make_checkpoint
import mlx.core as mx
import numpy as np
import official
import pytest
from moments import arrays_for, written

from ds4mlx import DataError
from ds4mlx.cli.main import run
from ds4mlx.convert import convert, feedback, verify
from ds4mlx.convert.allocation import ROUNDED, least
from ds4mlx.convert.choice import CHOICE, ROLES
from ds4mlx.convert.sensitivity import Sensitivity, write_sensitivity
from ds4mlx.custom_kernels.products.experts import DOWN, UP
from ds4mlx.engine import machine
from ds4mlx.evaluation.scoring import logit_blocks
from ds4mlx.evaluation.sensitivity import NOISE, Noisy, noise, sensitivities
from ds4mlx.weights.directory import MANIFEST

LAYERS = 3
SMALL = {
    "num_hidden_layers": LAYERS,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 0],
}


# Choosing


def drawn(seed):
    """Costs and sizes of six places; what is larger is better."""
    rng = np.random.default_rng(seed)
    names = [("a", "b", "c"), ("a", "c")]
    sizes = {(n, "x"): dict(zip(names[n % 2], (66, 84, 136), strict=False)) for n in range(6)}
    costs = {
        place: dict(zip(each, -np.sort(-rng.random(len(each))), strict=True))
        for place, each in sizes.items()
    }
    return costs, sizes


def total(table, formats):
    return sum(table[place][format] for place, format in formats.items())


@pytest.mark.parametrize("seed", range(3))
def test_the_least_of_all_that_fit(seed):
    costs, sizes = drawn(seed)
    every = [dict(zip(sizes, each, strict=True)) for each in product(*sizes.values())]
    low, high = (total(sizes, f) for f in (every[0], every[-1]))
    before = np.inf
    for room in range(low, high + 10, 7):
        formats = least(costs, sizes, room)
        assert total(sizes, formats) <= room
        best = min(total(costs, each) for each in every if total(sizes, each) <= room)
        assert total(costs, formats) == pytest.approx(best)
        assert best <= before  # more room never costs more
        before = best


def test_kernels_read_all_that_is_chosen():
    assert {*ROUNDED["gate_up"], "mxfp4"} <= set(UP.formats)
    assert {*ROUNDED["down"], "mxfp4"} <= set(DOWN.formats)


# Converting


@pytest.fixture(autouse=True, scope="module")
def hasty():
    """Without the descent of error feedback, where only its result's presence counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "SWEEPS", 0)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("three") / "official"
    make_checkpoint.make(str(path), 7, "tiny", SMALL)
    return path


@pytest.fixture(scope="module")
def calibrated(source, tmp_path_factory):
    """Files of second moments, and of sensitivities: the later the layer the more."""
    folder = tmp_path_factory.mktemp("calibrated")
    written(folder / "second", arrays_for(source))
    nats = {(n, role): (1.0 + 3 * n, 0.1) for n, role in product(range(LAYERS), ROLES)}
    write_sensitivity(folder / "steep", nats, 1000)
    return {"moments": folder / "second", "sensitivity": folder / "steep"}


@pytest.fixture(scope="module")
def bounds(source, tmp_path_factory):
    """Bytes of the smallest and of the largest choice."""
    target = tmp_path_factory.mktemp("bounds")
    plans = [convert(source, target, r, dry_run=True) for r in ("q2", "official")]
    return [plan.nbytes for plan in plans]


@pytest.fixture(scope="module")
def half(source, calibrated, bounds, tmp_path_factory):
    """A conversion whose budget lies in the middle, and that budget."""
    target, budget = tmp_path_factory.mktemp("half") / "auto", sum(bounds) // 2
    plan = convert(source, target, "q2-auto", budget=budget, **calibrated, progress=False)
    return target, budget, plan


def test_it_fits_and_more_helps(source, calibrated, bounds, tmp_path):
    low, high = bounds
    before, steep = None, calibrated["sensitivity"]
    for share in (0, 0.4, 1):
        budget = int(low + share * (high - 1 - low))
        sides = {"budget": budget, "sensitivity": steep, "dry_run": True, "progress": False}
        plan = convert(source, tmp_path, "q2-auto", **sides)
        assert low <= plan.nbytes <= budget
        assert before is None or plan.choice.expected <= before
        before = plan.choice.expected
    assert plan.choice.formats[LAYERS - 1, "gate_up"] == "mxfp4"  # matters most


def test_what_is_written(source, half):
    target, budget, plan = half
    manifest = json.loads((target / MANIFEST).read_text())
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    assert manifest["recipe"] == "q2-auto" and size == plan.nbytes <= budget
    for (layer, role), format in plan.choice.formats.items():
        for part in ROLES[role]:
            name = f"layers.{layer}.ffn.experts.{part}.weight"
            assert manifest["tensors"][name]["format"] == format
    assert all(each.cause is None for each in verify(target, source, progress=False))
    assert str(plan.choice).count("*") == 1 + 2 * LAYERS


def test_the_same_bytes_again(source, calibrated, half, tmp_path):
    target, _, _ = half
    sides = {"moments": calibrated["moments"], "progress": False}
    convert(source, tmp_path / "again", "q2-auto", choice=target / CHOICE, **sides)
    assert official.digests(tmp_path / "again") == official.digests(target)


def test_killed_then_the_same_bytes(source, bounds, tmp_path):
    budget = sum(bounds) // 2
    arguments = [source, tmp_path / "killed", 30, int(signal.SIGKILL), "q2-auto"]
    command = [sys.executable, dying.__file__, *arguments, "", budget]
    done = subprocess.run([*map(str, command)], check=False, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "killed" / CHOICE).exists()
    for name in ("killed", "whole"):
        convert(source, tmp_path / name, "q2-auto", budget=budget, progress=False)
    assert official.digests(tmp_path / "killed") == official.digests(tmp_path / "whole")


# Refusing


@pytest.mark.parametrize("which, change", [(0, -1), (1, 0)])
def test_budgets_that_leave_nothing_to_choose(source, bounds, tmp_path, which, change):
    with pytest.raises(DataError, match=f"{bounds[0]:,} bytes, and .*, {bounds[1]:,}"):
        convert(source, tmp_path, "q2-auto", budget=bounds[which] + change, progress=False)


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


@pytest.mark.parametrize("change", ["{", "q9_k", "ds4mlx choice 9", "cut"])
def test_choices_that_are_refused(source, half, tmp_path, change):
    content = json.loads((half[0] / CHOICE).read_text())
    if change == "q9_k":
        content["layers"][1]["down"]["format"] = change
    content["kind"] = change if "9" in change and change != "q9_k" else content["kind"]
    content["layers"] = content["layers"][: 1 if change == "cut" else None]
    (tmp_path / "odd").write_text("{" if change == "{" else json.dumps(content))
    with pytest.raises(DataError, match=r"odd: (is no choice|down of layer 1 cannot be stored)"):
        convert(source, tmp_path / "out", "q2-auto", choice=tmp_path / "odd")
    assert not (tmp_path / "out").exists()


USAGE = {
    "nothing to go by": ["--recipe", "q2-auto"],
    "both": ["--recipe", "q2-auto", "--budget", "1G", "--choice", "x"],
    "another recipe": ["--recipe", "q2", "--budget", "1G"],
    "no size": ["--recipe", "q2-auto", "--budget", "much"],
}


@pytest.mark.parametrize("kind", USAGE)
def test_wrong_usage(source, tmp_path, kind):
    assert run(["convert", str(source), str(tmp_path / "out"), *USAGE[kind]]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, number",
    [("89GB", 89 * 10**9), ("1.5G", 3 << 29), ("2GiB", 2 << 30), ("512m", 512 << 20), ("7B", 7)],
)
def test_sizes(text, number):
    assert machine.size(text) == number


# Measuring


IDS = list(range(3, 40))


def test_the_noise_is_as_large_as_it_is_said_to_be(stored_model):
    stack = stored_model.layers[0].ffn.experts.w1
    x, experts = mx.random.normal((200, 1, 1, stack.shape[-1])), mx.zeros((200, 1), mx.int32)
    exact, noisy = np.array(stack(x, experts)), np.array(Noisy(stack, 1)(x, experts))
    found = np.square(noisy - exact).sum() / np.square(exact).sum()
    assert found == pytest.approx(NOISE, rel=0.1)


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


def test_the_command(embedded_dir, tmp_path):
    (tmp_path / "text.txt").write_text("What matters is measured. " * 4)
    words = ["-m", embedded_dir, "--prompts", tmp_path / "text.txt", "-o", tmp_path / "steep"]
    assert run(["sensitivity", *map(str, words), "--max-tokens", "12"]) == 0
    found = Sensitivity.read(tmp_path / "steep", 5)
    assert len(found.nats) == 10 and found.fingerprint
