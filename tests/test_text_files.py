"""Texts of kernels in files that CUDA's compiler includes."""

import re
from pathlib import Path

import pytest

from ds4mlx.custom_kernels import text_files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text_files.included.cache_clear()
    yield tmp_path
    text_files.included.cache_clear()


def included(text: str) -> Path:
    named = re.fullmatch(r'#include "(.*)"\n', text_files.included(text))
    assert named
    return Path(named[1])


def test_the_file_holds_the_text():
    path = included("int one;\n")
    assert path.read_text() == "int one;\n" and path.is_absolute()
    assert included("int two;\n") != path


def test_a_damaged_file_is_written_anew():
    path = included("int one;\n")
    path.write_text("int oen;\n")
    text_files.included.cache_clear()
    assert included("int one;\n").read_text() == "int one;\n"


def test_the_text_itself_where_no_file_can_be_kept(cache):
    (cache / "ds4mlx").write_text("a file where the folder should be")
    assert text_files.included("int one;\n") == "int one;\n"
