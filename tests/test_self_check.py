"""The first use of kernels on a machine, simulated on the CPU executor."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest
from spoiling import executor_only, on_metal, spoiled

from ds4mlx import load
from ds4mlx.custom_kernels import comparisons, dispatch, self_check, verdicts
from ds4mlx.custom_kernels.cases.base import normal, relative
from ds4mlx.custom_kernels.first_use import prepare
from ds4mlx.custom_kernels.layer import hyper_post, router
from ds4mlx.errors import DataError

pytestmark = executor_only
GOOD, CHECK = self_check.good, self_check.check
WRONG = ("hyper_post", "16 + 4 * j + k", "16 + 4 * k + j")
BROKEN = ("hyper_post", "16 + 4 * j + k", "16 + 4 * j + nothing")
ASKED = {"hyper_post float32": ["hyper_post float32"]}
KERNELS = [("hyper_post", mx.float32), ("router_hashed", mx.float32)]


def new_process():
    """Forget what a process knows."""
    for known in (self_check._answers, self_check._kept, self_check._noted):
        known.clear()


@pytest.fixture(autouse=True)
def first_use(monkeypatch, tmp_path):
    """The self-check as it is, with a cache directory of its own; gives that."""
    monkeypatch.setattr(self_check, "good", GOOD)
    monkeypatch.setattr(self_check, "check", CHECK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DS4MLX_KERNELS", raising=False)
    comparisons.comparisons("metal")  # which another test may have found already, or not
    new_process()
    yield tmp_path / "ds4mlx" / "kernels"
    new_process()


def merge():
    """New streams, and what plain operations make of them."""
    streams, out = normal((2, 4, 64), mx.float32, 1), normal((2, 64), mx.float32, 2)
    weights, comb = normal((2, 4), mx.float32, 3), normal((2, 4, 4), mx.float32, 4)
    operands = streams, out, weights, comb
    return hyper_post.after_sublayer(*operands), hyper_post.plain(*operands)


def answers():
    return {name: self_check.good("metal", [name], dtype) for name, dtype in KERNELS}


def test_a_good_kernel_is_used_and_compared_once(launched, first_use, capsys):
    with on_metal():
        got, want = merge()
        assert relative(got, want) < 1e-5
    compared = launched.copy()
    assert compared["hyper_post"] > 1  # by comparisons and by the call
    assert set(compared) == {"hyper_post"}
    new_process()
    with on_metal():
        merge()
    assert launched["hyper_post"] == compared["hyper_post"] + 1
    assert capsys.readouterr().err == ""
    (file,) = first_use.glob("*.json")
    kept = json.loads(file.read_text())
    assert kept["known"] == {"hyper_post float32": {"good": True, "why": ""}}
    assert kept["about"] == verdicts.about() and kept["trying"] == []


@pytest.mark.parametrize(
    ("fault", "said"), [(WRONG, "off its plain operations"), (BROKEN, "MetalError")]
)
def test_a_bad_kernel_is_replaced(fault, said, launched, capsys):
    with spoiled(*fault):
        assert answers() == {"hyper_post": False, "router_hashed": True}
        before = launched.copy()
        got, want = merge()
        assert mx.array_equal(got, want) and launched == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "hyper_post float32" in lines[0] and said in lines[0]
    new_process()
    with on_metal():  # whatever the text is now: the verdict is kept
        assert answers() == {"hyper_post": False, "router_hashed": True}


def test_a_setting_goes_before_a_verdict(monkeypatch, launched):
    monkeypatch.setenv("DS4MLX_KERNELS", "1")
    with spoiled(*WRONG):
        got, want = merge()
        assert relative(got, want) > 0.1 and launched == {"hyper_post": 1}
        monkeypatch.setenv("DS4MLX_KERNELS", "0")
        got, want = merge()
        assert mx.array_equal(got, want) and launched == {"hyper_post": 1}


def ended_by(kernel):
    """A process of its own that ends when it launches a kernel; what is known then."""
    program = f"""
import os
from ds4mlx.custom_kernels import dialect, self_check
import mlx.core as mx
dialect.target = lambda: "metal"
self_check.comparisons.Comparison.fault = lambda self: os._exit(7) if "{kernel}" in self.kernels else None
self_check.check("metal", [("hyper_post", mx.float32), ("router_hashed", mx.float32)])
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 7
    return json.loads(verdicts.place().read_text())


def test_kernels_that_end_processes_are_not_tried_a_third_time(first_use, launched, capsys):
    for ended in ([], ["hyper_post float32"]):
        kept = ended_by("hyper_post")
        assert kept["trying"] == ["hyper_post float32"] and kept["ended"] == ended
    with on_metal():
        assert answers() == {"hyper_post": False, "router_hashed": True}
    assert set(launched) == {"router_hashed"}
    assert "the process ended twice while it was compared" in capsys.readouterr().err


def test_one_process_that_ended_is_no_verdict(first_use, capsys):
    ended_by("hyper_post")
    with on_metal():
        assert answers() == {"hyper_post": True, "router_hashed": True}
    assert capsys.readouterr().err == ""


def test_of_what_was_being_tried_a_good_kernel_stays_good(first_use):
    kept = verdicts.here()
    kept.known["hyper_post float32"] = verdicts.Verdict(True)
    first_use.mkdir(parents=True)
    for _ in range(2):
        kept.write(["hyper_post float32", "router_hashed float32"])
        with kept.alone():
            found = {name: verdict.good for name, verdict in kept.known.items()}
    assert found == {"hyper_post float32": True, "router_hashed float32": False}


def test_an_interrupted_check_is_begun_again(monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with on_metal():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(comparisons.Comparison, "fault", interrupted)
            answers()
        assert answers() == {"hyper_post": True, "router_hashed": True}


def test_a_device_that_stopped_is_told_of(monkeypatch):
    """And the kernel that stopped it is not launched by the next process."""

    def stopped(*arguments):
        raise RuntimeError("an illegal access")

    with spoiled(*BROKEN):
        with monkeypatch.context() as patch, pytest.raises(DataError, match="since hyper_post"):
            patch.setattr(mx, "ones", stopped)
            answers()
        new_process()
        assert answers() == {"hyper_post": False, "router_hashed": True}


@pytest.mark.parametrize("key", ["chip", "system", "mlx", "ds4mlx", "kernels"])
def test_a_verdict_of_another_version_is_none(key, first_use, monkeypatch):
    others = {**verdicts.about(), key: "another"}
    bad = {"hyper_post float32": {"good": False, "why": "of another"}}
    kept = json.dumps({"about": others, "known": bad, "asked": ASKED, "trying": [], "ended": []})
    first_use.mkdir(parents=True)
    verdicts.place().write_text(kept)
    with on_metal():
        assert GOOD("metal", ["hyper_post"], mx.float32)


@pytest.mark.parametrize("kept", ["", "{", "[]", '{"about": 1}', "\xff", '{"known": {}}'])
def test_a_damaged_file_is_none(kept, first_use):
    first_use.mkdir(parents=True)
    verdicts.place().write_bytes(kept.encode("latin-1"))
    with on_metal():
        assert GOOD("metal", ["hyper_post"], mx.float32)
    assert json.loads(verdicts.place().read_text())["known"]["hyper_post float32"]["good"]


def test_without_a_place_to_write_all_goes_on(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with spoiled(*WRONG):
        assert answers() == {"hyper_post": False, "router_hashed": True}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "cannot be kept" in lines[0] and "hyper_post" in lines[1]


@pytest.mark.parametrize("early", [False, True])
def test_a_fault_is_that_of_the_kernel_that_is_off(early):
    """The sums and the tiles that go with a bad kernel stay in use where they are good without it."""
    asked = [("experts_down_sorted", mx.float32), ("expert_tiles", mx.float32)]
    with spoiled("experts_down_sorted_q2_k", "place = order[row0 + r]", "place = row0 + r"):
        if early:
            CHECK("metal", [("experts_down_sorted_mxfp4", mx.float32)])
            CHECK("metal", [("experts_down_sorted_q2_k", mx.float32)])
        CHECK("metal", asked)
        names = ["experts_down_sorted_q2_k", "experts_down_sorted_mxfp4", "experts_sum"]
        used = [GOOD("metal", [name], mx.float32) for name in (*names, "expert_tiles")]
        assert used == [False, True, True, True]


def test_a_model_answers_rightly_with_a_bad_kernel(stored_model, launched, capsys):
    tokens = mx.array([[3, 17, 255, 9]])

    def logits():
        return stored_model(tokens, cache=stored_model.make_cache())

    with spoiled(*WRONG):
        prepare(logits)
        launched.clear()
        got = logits()
    assert launched["hyper_post"] == 0 and launched["hyper_mixes"] > 0
    assert "hyper_post" in capsys.readouterr().err
    with dispatch.plain_operations():
        assert float(mx.abs(got - logits()).max()) <= 1e-4


def test_every_kernel_that_a_model_launches_is_asked_about(stored_model, launched):
    """Under the name of one that is compared."""
    with dispatch.asking() as asked, dispatch.kernels(), on_metal():
        stored_model(mx.array([list(range(12))]), cache=stored_model.make_cache())
        stored_model(mx.array([[1]]), cache=stored_model.make_cache())
    names = {name for name, _ in asked}
    assert all(any(comparisons.named(kernel, name) for name in names) for kernel in launched)
    assert all(comparisons.of_kernel("metal", name, mx.float32) for name in names)


@pytest.mark.parametrize("target", ["metal", "cuda"])
def test_all_kernels_are_compared_at_both_types(target):
    types = {}
    for comparison in comparisons.comparisons(target):
        for kernel in comparison.kernels:
            types.setdefault(kernel, set()).add(comparison.case.dtype)
    assert len(types) > 30
    assert types["router"] == types["rows_4_kv_kv_index_spread"] == {mx.float32, mx.bfloat16}
    assert router.kernel(True).name in types


SPOILT = [
    ("hyper_dense", "row = job * GROUPS + group", "row = group"),
    ("dense_hyper", "spread = post[group]", "spread = post[0]"),
]


@pytest.mark.parametrize("fault", [None, *SPOILT], ids=["good", *(name for name, *_ in SPOILT)])
def test_loading_asks_about_what_answers_launch(small_dir, launched, fault):
    """So that nothing is compared while an answer is made, or several together: neither where a bad
    kernel is replaced by others."""
    with spoiled(*fault) if fault else on_metal(), dispatch.asking() as before:
        model, _ = load(small_dir, dtype=mx.float32)
        names, known = {name for name, _ in before}, set(self_check._answers)
        states = [model.make_cache() for _ in range(8)]
        launched.clear()
        with dispatch.asking() as during:
            mx.eval(model.last_logits(mx.array([list(range(60))]), states[0]))
            for count in (1, 2, 8):
                mx.eval(model.step(mx.ones((count,), mx.int32), states[:count]))
    assert {name for name, _ in during} <= names and launched
    assert set(self_check._answers) == known
    assert max(launched.values()) < 120, "more than these answers launch"


def test_what_stands_for_a_bad_kernel_is_asked_about(stored_model):
    """Before a step is traced, in which nothing should be compared."""

    def step():
        return stored_model.step(mx.ones((1,), mx.int32), [stored_model.make_cache()])

    with spoiled("dense_hyper", "spread = post[group]", "spread = post[0]"):
        prepare(step)
        known = set(self_check._answers)
        assert ("metal", "hyper_out", mx.float32) in known
        mx.eval(step())
        assert set(self_check._answers) == known
