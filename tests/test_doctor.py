"""`ds4mlx doctor`: what it says of this machine, in both outputs, and what it keeps to itself."""

import json
import os
from pathlib import Path

import mlx.core as mx
import pytest
import yaml

from ds4mlx import __version__
from ds4mlx.cli.doctor import allocator
from ds4mlx.cli.main import run
from ds4mlx.custom_kernels import dialect, verdicts
from ds4mlx.custom_kernels.verdicts import Verdict
from ds4mlx.engine import machine

TOPICS = "ds4mlx python machine memory mlx kernels model packages environment".split()  # noqa: SIM905


@pytest.fixture
def facts(capsys):
    """The facts that the command prints as JSON."""

    def facts():
        assert run(["doctor", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return facts


def test_both_outputs_have_every_topic(facts, capsys):
    found = facts()
    assert list(found) == TOPICS and not any("fault" in known for known in found.values())
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if not line.startswith(" ")] == TOPICS and err == ""
    for value in (__version__, os.cpu_count(), mx.__version__, found["kernels"]["why"]):
        assert str(value) in out


def test_the_facts_are_those_of_this_machine(facts):
    found = facts()
    memory = found["memory"]
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]
    assert found["mlx"]["computes_on"] == ("GPU" if mx.default_device() == mx.gpu else "CPU")
    kernels = found["kernels"]["kernels"]
    assert {"router", "experts_up", "dense_matvec"} <= {kernel["name"] for kernel in kernels}
    assert all(kernel["why"] and kernel["what"] for kernel in kernels)
    assert all(kernel["used"] == found["kernels"]["used"] for kernel in kernels)


def test_another_allocator_is_advised_where_there_is_none():
    own = "7f20-7f30 r-xp 00000000 fe:00 12 /usr/lib/x86_64-linux-gnu/libc.so.6\n"
    assert "LD_PRELOAD=libtcmalloc_minimal.so.4" in allocator(own)
    given = "7f00-7f10 r-xp 00000000 fe:00 12 /usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4\n"
    assert allocator(own + given) == "tcmalloc"


def test_verdicts_are_told(facts, capsys, monkeypatch, tmp_path):
    """With the file they are in; a bad one's reason, for people too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DS4MLX_KERNELS", raising=False)
    assert "verdicts" not in facts()["kernels"] or mx.default_device() == mx.gpu
    monkeypatch.setattr(dialect, "target", lambda: "metal")
    assert facts()["kernels"]["verdicts"] == []
    known = verdicts.here()
    known.path.parent.mkdir(parents=True)
    known.known = {"b float32": Verdict(True), "a bfloat16": Verdict(False, "it is off")}
    known.write()
    kernels = facts()["kernels"]
    assert kernels["used"] and "as good as plain operations" in kernels["why"]
    assert kernels["verdicts in"] == str(known.path)
    assert kernels["verdicts"] == [
        {"kernel": "a bfloat16", "good": False, "why": "it is off"},
        {"kernel": "b float32", "good": True, "why": ""},
    ]
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 are good" in out and "it is off" in out


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="there are kernels here")
def test_without_a_gpu_there_is_nothing_to_compare(capsys):
    assert run(["doctor", "--compare"]) == 1
    assert "error: kernels run on a GPU" in capsys.readouterr().err


def test_secrets_are_not_told(facts, monkeypatch):
    monkeypatch.setenv("DS4MLX_API_KEY", "hush")
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("DS4MLX_KERNELS", "0")
    found = facts()
    assert found["environment"]["DS4MLX_API_KEY"] == "(set)"
    assert found["environment"]["DS4MLX_KERNELS"] == "0" and "hush" not in json.dumps(found)


def test_a_part_that_breaks_does_not_hide_the_others(facts, monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: 1 / 0)
    found = facts()
    assert found["python"] == {"fault": "ZeroDivisionError: division by zero"}
    assert list(found) == TOPICS and found["ds4mlx"]["version"] == __version__


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 1 << 40, 1 << 40),
        ({"memory.max": "max", "memory.current": "1"}, 1 << 40, 1 << 40),
        ({"memory.max": "1000", "memory.current": "300"}, 1000, 700),
        ({"memory.max": "1000", "memory.current": "1100"}, 1000, 0),
        ({"a/memory.max": "500", "a/memory.current": "300"}, 500, 200),
        ({"memory/memory.limit_in_bytes": "800", "memory/memory.usage_in_bytes": "0"}, 800, 800),
        ({"memory.max": "soon", "memory.current": "x"}, 1 << 40, 1 << 40),
    ],
)
def test_the_limits_of_containers_count(monkeypatch, tmp_path, files, total, available):
    """Of both versions of control groups; a file's cached pages are as good as free."""
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
        (file.parent / "memory.stat").write_text("inactive_file 0\n")
    limits = machine.limits(tmp_path, ["4:memory:/a", "0::/a"])
    assert min([1 << 40, *(most for most, _ in limits)]) == total
    assert min([1 << 40, *(max(most - used, 0) for most, used in limits)]) == available


def test_issue_templates_ask_for_it():
    folder = Path(__file__).parents[1] / ".github" / "ISSUE_TEMPLATE"
    templates = [yaml.safe_load(file.read_text()) for file in folder.glob("*.yml")]
    asking = [template for template in templates if "body" in template]
    assert len(asking) == 2
    for template in asking:
        labels = [part["attributes"]["label"] for part in template["body"]]
        assert "The output of `ds4mlx doctor`" in labels
