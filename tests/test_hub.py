"""Hub repositories as sources. No network: what would have been downloaded lies in the hub's cache."""

import official
import pytest

from ds4mlx.cli.main import run
from ds4mlx.convert import convert

COMMIT = "0" * 40


@pytest.fixture
def cached(small_source, tmp_path, monkeypatch):
    """A repository in the layout that huggingface_hub keeps on disk; the path of its snapshot."""
    repo = tmp_path / "models--someone--small"
    snapshot = official.copy(small_source, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_a_repo_that_cannot_be_had(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(["convert", "nobody/nothing-here", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert line.startswith(
        "error: nobody/nothing-here: no such directory, and not found on the hub"
    )
    assert line.count("\n") == 1


def test_a_repo_is_read_from_the_cache(cached, tmp_path):
    plan = convert("someone/small", tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "manifest.json").exists()
    assert plan.source.config.num_hidden_layers == 3


def test_another_architecture_is_refused_before_its_weights_are_fetched(
    cached, tmp_path, monkeypatch, capsys
):
    official.edit_config(cached, model_type="deepseek_v32")
    for file in cached.glob("*.safetensors"):
        file.unlink()
    assert run(["convert", "someone/small", str(tmp_path / "out")]) == 1
    assert "model_type 'deepseek_v32' is not supported" in capsys.readouterr().err
