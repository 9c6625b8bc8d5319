"""When MLX hands launches to an NVIDIA GPU."""

import os

import mlx.core as mx
import pytest

from ds4mlx.cli.opening import open_model
from ds4mlx.custom_kernels import dispatch
from ds4mlx.submission import VARIABLE, submit_by_number


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(VARIABLE)


@pytest.mark.parametrize("kernels, generates", [(True, True), (False, True), (True, False)])
def test_a_command_that_generates_by_kernels_submits_by_number(
    monkeypatch, tiny_dir, kernels, generates
):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "in_use", lambda: kernels)
    open_model(str(tiny_dir), generates=generates)
    assert os.environ.get(VARIABLE) == ("1000000" if kernels and generates else None)


def test_what_is_set_stays(monkeypatch):
    monkeypatch.setenv(VARIABLE, "40")
    submit_by_number()
    assert os.environ[VARIABLE] == "40"


def test_nothing_changes_on_metal(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    submit_by_number()
    assert VARIABLE not in os.environ
