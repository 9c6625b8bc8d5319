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
from ds4mlx.convert import convert, dequantize, feedback, quantize, verify
from ds4mlx.convert.allocation import ROUNDED, error, least
from ds4mlx.convert.choice import CHOICE, READ, ROLES
from ds4mlx.convert.encoder import Encoder
from ds4mlx.convert.moments import Moments
from ds4mlx.convert.official import OfficialSource
from ds4mlx.convert.quantise import decode
from ds4mlx.convert.quantise_fed import quantise_fed
from ds4mlx.convert.sensitivity import write_sensitivity
from ds4mlx.custom_kernels.products.experts import DOWN, UP
from ds4mlx.engine import machine
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


def test_kernels_read_all_that_may_be_chosen():
    for role, kernels in (("gate_up", UP), ("down", DOWN)):
        assert {*ROUNDED[role]} <= {*READ[role]} and {*READ[role], "mxfp4"} == {*kernels.formats}


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


def opened(source):
    """The source, and its experts by name."""
    found = OfficialSource(source)
    entries = (entry for listed in found.inventory.values() for entry in listed)
    return found, {entry.name: entry for entry in entries if entry.kind == "experts"}


def test_what_a_format_costs(source, calibrated, half):
    """Its share of what comes out, squared, as second moments predict it; times the sensitivity."""
    found, entries = opened(source)
    moments, shares = Moments(calibrated["moments"]), []
    for part, expert in product(ROLES["gate_up"], range(2)):
        entry = entries[f"layers.1.ffn.experts.{part}.weight"]
        rows, columns = entry.shape[-2:]
        moment, values = moments.of(entry, expert), found.values(entry, expert, 0, rows)
        planes = quantise_fed(mx.array(values), "iq2_xxs", moment)[0]
        gap = np.array(decode("iq2_xxs", planes)).reshape(rows, columns) - values
        h = np.array(moment.h) - feedback.DAMPING * np.eye(columns)
        shares.append(np.trace(gap @ h @ gap.T) / np.trace(values @ h @ values.T))
    costs = half[2].choice.costs[1, "gate_up"]
    assert costs["iq2_xxs"] == pytest.approx(4 * np.mean(shares), rel=1e-3)
    assert costs["mxfp4"] == 0


def test_without_moments_the_weights_count(source):
    found, entries = opened(source)
    entry = entries["layers.0.ffn.experts.w2.weight"]
    values = [found.values(entry, n, 0, entry.shape[-2]) for n in range(2)]
    shares = [
        np.square(dequantize(quantize(w, "Q2_K")) - w).sum() / np.square(w).sum() for w in values
    ]
    assert error(Encoder(found), entry, "q2_k") == pytest.approx(np.mean(shares), rel=1e-3)


def test_experts_that_are_rounded_together(source, calibrated):
    """No more than are wanted; and from where all of a layer's would begin, after an interruption."""
    found, entries = opened(source)
    entry = entries["layers.0.ffn.experts.w1.weight"]
    sides = found, None, Moments(calibrated["moments"])
    for together, want in ((None, {0, 1}), (1, {1})):
        encoder = Encoder(*sides, together=together)
        encoder.rows("iq2_xxs", entry, 1, slice(0, entry.shape[-2]))
        assert {expert for _, _, expert in encoder._stacked} == want


def test_a_choice_is_kept_for_the_same_only(source, calibrated, half, tmp_path):
    """What lies in the target is told by a cost that no choosing gives."""
    content = json.loads((half[0] / CHOICE).read_text())
    content["layers"][0]["down"]["costs"]["q2_k"] = 77.0
    (tmp_path / "target").mkdir()

    def kept(budget):
        (tmp_path / "target" / CHOICE).write_text(json.dumps(content))
        sides = {"budget": budget, **calibrated, "dry_run": True, "progress": False}
        costs = convert(source, tmp_path / "target", "q2-auto", **sides).choice.costs
        return costs[0, "down"]["q2_k"] == 77.0

    assert kept(half[1]) and not kept(half[1] + 1)
    content["layers"][0]["down"]["format"] = "q4_k"  # edited: no longer what was chosen
    assert not kept(half[1])


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


def test_moments_of_another_model(source, bounds, tmp_path):
    arrays = arrays_for(source)
    arrays["layers.0.w1"] = arrays["layers.0.w1"][:-1, :-1].copy()
    sides = {"moments": written(tmp_path / "other", arrays), "progress": False}
    with pytest.raises(DataError, match=r"other: .*these are moments of another model"):
        convert(source, tmp_path / "out", "q2-auto", budget=sum(bounds) // 2, **sides)


@pytest.mark.parametrize("change", ["{", "q9_k", "iq2_xxs", "much", "ds4mlx choice 9", "cut"])
def test_choices_that_are_refused(source, half, tmp_path, change):
    content = json.loads((half[0] / CHOICE).read_text())
    if change in ("q9_k", "iq2_xxs"):  # no kernel reads down in the latter
        content["layers"][1]["down"]["format"] = change
    if change == "much":
        content["layers"][1]["down"]["costs"]["q2_k"] = change
    content["kind"] = change if "9" in change and change != "q9_k" else content["kind"]
    content["layers"] = content["layers"][: 1 if change == "cut" else None]
    (tmp_path / "odd").write_text("{" if change == "{" else json.dumps(content))
    with pytest.raises(DataError, match=r"odd: (is no choice|down of layer 1 cannot be stored)"):
        convert(source, tmp_path / "out", "q2-auto", choice=tmp_path / "odd")
    assert not (tmp_path / "out").exists()


USAGE = {
    "nothing to go by": ["--recipe", "q2-auto"],
    "both": ["--recipe", "q2-auto", "--budget", "1G", "--choice", "x"],
    "both, another recipe": ["--recipe", "q2", "--budget", "1G", "--choice", "x"],
    "sensitivities, another recipe": ["--recipe", "q2", "--sensitivity", "x"],
    "sensitivities and a choice": ["--recipe", "q2-auto", "--choice", "x", "--sensitivity", "x"],
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
