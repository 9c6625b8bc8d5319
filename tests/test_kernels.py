"""Every kernel equals its reference; run on the CPU executor, or on a Mac on Metal itself."""

import pytest
from metalsim import options_of
from spoiling import named, on_metal

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.cases.base import TOLERANCE
from ds4mlx.custom_kernels.comparisons import case_files, cases_of, take_forms
from ds4mlx.state.row_forms import forms

take_forms(forms)


def of_all_files(width):
    return [each for file in case_files() for each in named(cases_of(file, width))]


def test_every_file_has_cases():
    files = {file.__name__.rpartition(".")[2]: file for file in case_files()}
    assert files.pop("base") and len(files) > 10
    for name, file in files.items():
        assert cases_of(file, "small") and cases_of(file, "wide"), name


@pytest.mark.parametrize("case", of_all_files("small"))
def test_small(case):
    """Checked for races, stray accesses, and bytes that are never written."""
    with on_metal(), dispatch.kernels(), options_of(checked=True):
        assert case.error() <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", of_all_files("wide"))
def test_wide(case):
    with on_metal(), dispatch.kernels():
        assert case.error() <= TOLERANCE[case.dtype]
