"""Every kernel equals its reference; run on the CPU executor, or on a Mac on Metal itself."""

import pytest
from metalsim import options_of
from spoiling import named, on_metal

from ds4mlx.custom_kernels.cases import modules as cases
from ds4mlx.custom_kernels.cases.base import TOLERANCE


@pytest.fixture(autouse=True)
def metal():
    with on_metal():
        yield


@pytest.mark.parametrize("case", named(cases.small()))
def test_small(case):
    """Checked for races, stray accesses, and bytes that are never written."""
    with options_of(checked=True):
        assert case.error() <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", named(cases.wide()))
def test_wide(case):
    assert case.error() <= TOLERANCE[case.dtype]
