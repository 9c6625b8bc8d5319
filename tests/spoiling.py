"""Kernels run on the CPU executor as on a Mac, and faults put into their texts."""

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import mlx.core as mx
import pytest
from metalsim import MetalError, metal_kernel, options_of, record
from metalsim.kernel import REAL
from metalsim.text import Launch

from ds4mlx.custom_kernels import dialect
from ds4mlx.custom_kernels.cases.base import Case, Pairs

# A kernel's name (or how it begins), what is computed, the text, and what stands in its place.
Fault = tuple[str, Callable[[], Pairs], str, str]

executor_only = pytest.mark.skipif(sys.platform == "darwin", reason="shown by the executor")


@contextlib.contextmanager
def on_metal() -> Iterator[pytest.MonkeyPatch]:
    """Inside the block kernels run as on a Mac: there on Metal, elsewhere on the executor."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform != "darwin":
            patch.setattr(dialect, "target", lambda: "metal")
            patch.setattr(mx.fast, "metal_kernel", metal_kernel)
            patch.setattr(dialect.Kernel, "_made", property(lambda self: {}))
            patch.setenv(
                "MLX_DISABLE_COMPILE", "1"
            )  # which whoever turns it off for a while looks at
            mx.disable_compile()  # the executor runs a kernel when it is called, and traces nothing
        try:
            yield patch
        finally:
            mx.enable_compile()


@contextlib.contextmanager
def handed_to_metal() -> Iterator[list[tuple[str, Launch]]]:
    """Inside the block nothing is computed: what kernels would hand to Metal, with their names."""
    handed: list[tuple[str, Launch]] = []

    def maker(name, inputs, outputs, source, header=""):
        real = REAL(name, inputs, outputs, source, header=header)

        def call(*, inputs, output_shapes, output_dtypes, **launch):
            sides = {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
            handed.append((name, record(real, inputs, **sides, **launch)))
            return [mx.zeros(*side) for side in zip(output_shapes, output_dtypes, strict=True)]

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dialect, "target", lambda: "metal")
        patch.setattr(mx.fast, "metal_kernel", maker)
        patch.setattr(dialect.Kernel, "_made", property(lambda self: {}))
        yield handed


@contextlib.contextmanager
def spoiled(name: str, old: str, new: str) -> Iterator[list[bool]]:
    """Inside the block `new` stands for `old` in the kernels whose name begins so."""
    text, met = dialect.Kernel.text, []

    def changed(self, where):
        header, body = text(self, where)
        if not self.name.startswith(name):
            return header, body
        assert old in header + body, f"{name} has no {old!r}"
        met.append(True)
        return header.replace(old, new), body.replace(old, new)

    with on_metal() as patch:
        patch.setattr(dialect.Kernel, "text", changed)
        yield met


def assert_caught(name: str, compute: Callable[[], Pairs], old: str, new: str) -> None:
    """The comparison fails, or the executor finds something, once the fault is in."""
    with spoiled(name, old, new) as met, options_of(checked=True, timeout=5):
        try:
            error = Case(name, mx.bfloat16, compute).error()
        except MetalError:
            error = float("inf")
    assert met and error > 4e-3


def named(cases: Iterable[Case]) -> list:
    """The parameters of a test of cases, named; what comes at two types is slow at one of them.

    Two cases are quick in float32, the next two in bfloat16, and so on, as kernels come in pairs.
    """
    cases = list(cases)
    bare = [re.sub(r"mlx\.core\.\w+", "", case.name) for case in cases]
    turns = {name: number // 2 % 2 for number, name in enumerate(dict.fromkeys(bare))}
    types = Counter(bare)
    return [
        pytest.param(
            case,
            id=f"{case.name}, {str(case.dtype).rpartition('.')[2]}",
            marks=slow_if(types[name] == 2 and (case.dtype == mx.bfloat16) != turns[name]),
        )
        for case, name in zip(cases, bare, strict=True)
    ]


def slow_if(wanted: bool) -> list:
    """The marks of a parameter that is left to the nightly run, or not."""
    return [pytest.mark.slow] if wanted else []


def fault_ids(faults: Sequence[Fault]) -> list:
    """The parameters of a test of faults, named; all but two of a kernel are slow.

    Of those with a barrier left out, which the executor finds and no value shows, one is quick.
    """
    quick = set()
    for kernel in {fault[0] for fault in faults}:
        own = [i for i, fault in enumerate(faults) if fault[0] == kernel]
        quick.update(sorted(own, key=lambda i: "barrier" not in faults[i][2])[:2])
    return [
        pytest.param(*f, id=f"{f[0]}: {f[2].strip()[-40:]}", marks=slow_if(i not in quick))
        for i, f in enumerate(faults)
    ]


def assert_two_each(faults: Sequence[Fault]) -> None:
    """Every kernel named has two faults at least."""
    assert faults and min(Counter(name for name, *_ in faults).values()) >= 2
