"""The notebooks run from top to bottom on less text, and are kept with their plots and findings."""

import base64
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
QUICK = {
    "01_convert_and_generate": "TOKENS = 4",
    "02_two_bits": "TOKENS, LAYERS = 24, 1",
    "03_kv_state": "LINES = 250",
    "04_logit_lens": "TOKENS = 20",
    "05_experts": "TOKENS = 40",
    "06_indexer": "LETTERS, ASKED = 60, range(1)",
    "07_patching": "LETTERS, LAST = 60, 1",
    "08_steering": "STEPS, TOKENS = 3, 2",
    "09_lora": "STEPS, EVERY = 1, 1",
}


# Those that every run of the suite executes; the nightly one executes all.
FAST = ("01_convert_and_generate", "06_indexer")


def marked(path):
    marks = () if path.stem in FAST else pytest.mark.slow
    return pytest.param(path, marks=marks, id=path.stem)


def pictures(cell):
    outputs = cell.get("outputs", [])
    return [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]


@pytest.mark.parametrize("path", [marked(path) for path in NOTEBOOKS])
def test_runs_without_a_warning(path, embedded_plain, tmp_path, monkeypatch):
    monkeypatch.setenv("DS4MLX_MODEL", str(embedded_plain))
    notebook = nbformat.read(path, 4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = QUICK[path.stem]
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []
    assert sum(len(pictures(cell)) for cell in notebook.cells) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_kept_with_plots_and_findings(path):
    """Small plots with a title, one sentence or two of finding above each, and no warnings."""
    cells = nbformat.read(path, 4).cells
    drawn = [n for n, cell in enumerate(cells) if pictures(cell)]
    assert len(drawn) >= 2
    assert [n for n, cell in enumerate(cells) if "plt.subplots" in cell.source] == drawn
    for n in drawn:
        assert "**Finding.**" in cells[n - 1].source
        assert "title(" in cells[n].source
        assert all(len(base64.b64decode(picture)) < 100_000 for picture in pictures(cells[n]))
    assert not any(o.get("name") == "stderr" for cell in cells for o in cell.get("outputs", []))
