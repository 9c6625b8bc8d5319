"""The documentation agrees with the code: help, docstrings, examples, and every name in it."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import test_floors
import typer.main

from ds4mlx.cli.main import app

ROOT = Path(__file__).parents[1]
GENERATED = {ROOT / "docs" / name for name in ("commands.md", "api.md", "tree.md")}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("*/*.md")),
]
WRITTEN = [page for page in PAGES if page not in GENERATED]


def load_generator(name="generate"):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_generated_pages_are_those_of_the_code(monkeypatch):
    for name in ("COLUMNS", "NO_COLOR", "TERM"):
        monkeypatch.setenv(name, "")
    for path, text in load_generator().outputs().items():
        assert path.read_text() == text, f"{path.name}: run `python docs/generate.py`"


def test_the_figure_of_error_feedback_is_that_of_the_results():
    script = load_generator("feedback_figure")
    drawn = script.picture(json.loads(script.RESULTS.read_text()))
    assert (ROOT / "docs/feedback.svg").read_text() == drawn


def command_lines():
    for page in WRITTEN:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith("ds4mlx "):
                    yield pytest.param(line, id=f"{page.stem}: {line.split('#')[0].strip()}")


@pytest.mark.parametrize("line", [*command_lines()])
def test_commands_and_options_exist(line):
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index("|")] if "|" in words else words
    command, taken = typer.main.get_command(app), []
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        taken.append(words[0])
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in parameter.opts}
    known |= {name for parameter in command.params for name in parameter.secondary_opts}
    for word in words:
        if re.match(r"--?[a-z]", word):
            assert word.partition("=")[0] in known, f"{' '.join(taken)} has no {word}"
    assert command.params or not words


@pytest.mark.parametrize(
    "page", [p for p in WRITTEN if blocks(p, "python")], ids=lambda page: page.stem
)
def test_examples_run(page, embedded_plain, tmp_path, monkeypatch):
    """The blocks of a page as one program, where every model it names is the embedded one."""
    monkeypatch.setenv("DS4MLX_MODEL", str(embedded_plain))
    program = re.sub(r"~/models/[\w-]+", str(embedded_plain), "\n".join(blocks(page, "python")))
    program = program.replace("~/", f"{tmp_path}/")
    run = [sys.executable, "-c", program]
    done = subprocess.run(
        run, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


FIRST_STEPS = {
    'trace("layers.3.streams")': "research",
    'trace("layers.3.ffn.router")': "research",
    "ablate_experts(0)": "research",
    "mx.grad(score)": "research",
    "add_lora(model": "lora",
}


@pytest.mark.parametrize(("step", "page"), FIRST_STEPS.items())
def test_what_a_researcher_does_first_takes_six_lines(step, page):
    """Streams, a router's choices, an expert less, a gradient, an adapter; they run with their page."""
    found = [block for block in blocks(ROOT / f"docs/{page}.md", "python") if step in block]
    assert found and len([line for line in found[0].splitlines() if line.strip()]) <= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        goal = page.parent / file if file else page
        assert goal.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", goal.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_backticks_exist(page):
    """A path with a folder in it, as in `tests/faults/` or `benchmarks/kv_store.py`."""
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", page.read_text()):
        if path.split("/")[0] in {p.name for p in ROOT.iterdir()}:
            assert (ROOT / path).exists(), path


def walks():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for title, body in re.findall(
        r"^### The way of (.*?)\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE
    ):
        yield pytest.param(re.findall(r"`([\w/]+\.py):([\w.]+)`", body), id=title)


@pytest.mark.parametrize("steps", [*walks()])
def test_the_walks_name_what_exists_and_go_down_the_floors(steps):
    assert len(steps) >= 5
    heights = []
    for file, name in steps:
        path = ROOT / file
        scope = ast.parse(path.read_text()).body
        for part in name.split("."):
            defined = [n for n in scope if getattr(n, "name", None) == part]
            assert defined, f"{file} has no {name}"
            scope = getattr(defined[0], "body", [])
        module = "ds4mlx." + file.removeprefix("ds4mlx/").removesuffix(".py").replace("/", ".")
        heights.append(test_floors.FLOOR[test_floors.room(module)])
    assert heights == sorted(heights, reverse=True)


def test_the_readme_fits_and_its_commands_are_single_lines():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    start = text[text.index("## Quick start") :]
    first = re.findall(r"^```bash\n(.*?)^```", start, re.DOTALL | re.MULTILINE)[:2]
    assert [block.strip() for block in first] == ["./run.sh demo", "./run.sh test"]
