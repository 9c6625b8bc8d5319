"""Where MLX cannot be imported: what works all the same, and what the rest says."""

import json
import sys

import processes
import pytest

from ds4mlx import __version__

CAUSE = "libmlx.so: cannot open shared object file: No such file or directory"


@pytest.fixture(params=["no back-end", "not installed"])
def without(request, tmp_path):
    """Runs a command with an MLX as pip installs it on Linux without an extra, or with none."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("")
    error = f"ImportError({CAUSE!r})"
    if request.param == "not installed":
        error = "ModuleNotFoundError(\"No module named 'mlx.core'\", name='mlx.core')"
    (tmp_path / "mlx" / "core.py").write_text(f"raise {error}\n")
    path = f"{tmp_path}:{processes.environment().get('PYTHONPATH', '')}"
    return lambda *arguments: processes.run(*arguments, PYTHONPATH=path)


def test_help_and_version_need_no_mlx(without):
    done = without("--version")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == f"ds4mlx {__version__}\n"
    assert without("cache", "ls", "-h").returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="MLX brings its own back-end elsewhere")
@pytest.mark.parametrize("arguments", [["generate", "a"], ["cache", "ls", "--kv-dir", "/tmp"]])
def test_commands_name_the_remedy(without, arguments):
    done = without(*arguments)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1 and done.stdout == b""
    assert line.startswith("error: MLX cannot be imported (")
    assert "pip install 'ds4mlx[cpu]'" in line and "pip install 'ds4mlx[cuda]'" in line


def test_doctor_names_the_remedy(without):
    done = without("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    facts = json.loads(done.stdout)
    assert "MLX cannot be imported" in facts["mlx"]["fault"] == facts["kernels"]["fault"]
    assert facts["memory"]["total_bytes"] > 0 and facts["packages"]["typer"]
