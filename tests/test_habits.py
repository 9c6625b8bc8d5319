"""One set of versions and one set of checks: on a desk, before a commit, and in continuous integration."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def names(requirements):
    return sorted({re.match(r"[\w-]+", r).group().lower().replace("_", "-") for r in requirements})


def test_the_lock_is_of_this_project():
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    own = next(package for package in lock["package"] if package["name"] == "ds4mlx")
    wanted = PROJECT["project"]["dependencies"] + [
        requirement
        for extra in PROJECT["project"]["optional-dependencies"].values()
        for requirement in extra
    ]
    assert sorted({entry["name"] for entry in own["metadata"]["requires-dist"]}) == names(wanted)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_files_that_exist(path):
    steps = yaml.safe_load(path.read_text())
    triggers = steps[True].get("push") or {}  # YAML 1.1 reads `on` as true
    runs = " ".join(s.get("run", "") for job in steps["jobs"].values() for s in job["steps"])
    scripts = re.findall(r"[\w./-]+/[\w-]+(?:\.py|\.sh|run)?", runs)
    assert scripts or "run.sh" in runs
    for pattern in [*triggers.get("paths", []), *(s.removeprefix("./") for s in scripts)]:
        assert list(ROOT.glob(pattern)), f"{path.name}: {pattern}"


def test_every_way_runs_the_same_checks():
    """Hooks and `run.sh test` take ruff and the type checker from .venv; CI calls `run.sh test`."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    commands = [hook["entry"] for repository in hooks for hook in repository["hooks"]]
    run = (ROOT / "run.sh").read_text()
    for command in (".venv/bin/ruff check", ".venv/bin/ruff format", ".venv/bin/basedpyright"):
        assert any(entry.startswith(command) for entry in commands)
        assert command in run
    assert "./run.sh test" in (ROOT / ".ci/run").read_text()
    assert any(".ci/run" in path.read_text() for path in WORKFLOWS)


def test_tests_and_benchmarks_import_nothing_of_each_other():
    """What both need lies in the package or in oracle/."""
    rooms = {name: sorted((ROOT / name).rglob("*.py")) for name in ("tests", "benchmarks")}
    for name, other in (("tests", "benchmarks"), ("benchmarks", "tests")):
        modules = {path.stem for path in rooms[other]} - {"__init__"}
        for path in rooms[name]:
            nodes = [*ast.walk(ast.parse(path.read_text()))]
            taken = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
            taken |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
            assert not taken & modules, f"{path.name} imports {sorted(taken & modules)}"
