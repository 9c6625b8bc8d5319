"""Every kernel equals its reference; run on the CPU executor, or on a Mac on Metal itself."""

import sys

import mlx.core as mx
import pytest
from metalsim import metal_kernel, options_of

from ds4mlx.bench import kernel_cases as cases
from ds4mlx.custom_kernels import dialect

ON_METAL = sys.platform == "darwin"


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    """Kernels run as on a Mac."""
    if not ON_METAL:
        monkeypatch.setattr(dialect, "target", lambda: "metal")
        monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)


def named(found):
    return [pytest.param(c, id=f"{c.name}, {str(c.dtype).rpartition('.')[2]}") for c in found]


@pytest.mark.parametrize("case", named(cases.small_cases()))
def test_small(case):
    """Checked for races, stray accesses, and bytes that are never written."""
    with options_of(checked=True):
        assert case.error() <= cases.TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", named(cases.wide_cases()))
def test_wide(case):
    assert case.error() <= cases.TOLERANCE[case.dtype]
