"""Where Python finds the package: also beside a clone of its own name, which is a folder as good."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta as b; print(b.build_editable(sys.argv[1]))"
FIND = """\
import site, sys
site.addsitedir(sys.argv[1])
from importlib.util import find_spec
print(find_spec("ds4mlx").origin)
"""


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """What an editable install puts into site-packages."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("editable")
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(folder / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(folder / "site-packages")
    return folder / "site-packages"


def test_an_editable_install_is_an_entry_of_the_path(editable):
    """And no import hook, which would come too late and which type checkers cannot follow."""
    (path,) = editable.glob("*.pth")
    assert Path(path.read_text().strip()).samefile(ROOT)
    assert not list(editable.glob("*.py"))


@pytest.mark.parametrize("way", ["-c", "script", "elsewhere"])
def test_the_package_is_found_beside_its_clone(editable, tmp_path, way):
    """In the folder that holds it, from a script in that folder, and anywhere else."""
    if way != "elsewhere":
        (tmp_path / "ds4mlx").symlink_to(ROOT)
    (tmp_path / "beside.py").write_text(FIND)
    program = [tmp_path / "beside.py"] if way == "script" else ["-c", FIND]
    # -S: without the packages of the Python that runs this, where it may be installed otherwise.
    command = [sys.executable, "-S", *map(str, program), str(editable)]
    done = subprocess.run(command, cwd=tmp_path, env={}, check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()).samefile(ROOT / "ds4mlx" / "__init__.py")
