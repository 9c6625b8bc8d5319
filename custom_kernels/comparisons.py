"""Which comparisons there are of which kernels, and what a comparison says.

Comparisons are the cases of every file in `cases/`. Which kernels one launches is known by recording
its launches, so that a case names none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from types import ModuleType

import mlx.core as mx

from ds4mlx.custom_kernels import cases, dialect
from ds4mlx.custom_kernels.cases.base import TOLERANCE, Case, Forms
from ds4mlx.custom_kernels.recorder import Recorder

_forms: list[Forms] = []  # one, once it is known


@dataclass(frozen=True)
class Comparison:
    """A case, and the names of the kernels that it launches, in the order of the first launches."""

    case: Case
    kernels: tuple[str, ...]

    def fault(self) -> str | None:
        """What is wrong with what the kernels gave, as a clause; None if nothing is."""
        try:
            error = self.case.error()
        except Exception as raised:  # noqa: BLE001 - whatever a compiler or a driver raises
            return f"{type(raised).__name__}: {_one_line(str(raised))}"
        if error <= TOLERANCE[self.case.dtype]:
            return None
        return f"it is {error:.1e} off its plain operations in the comparison {self.case.name!r}"


def _one_line(text: str, most: int = 300) -> str:
    """The beginning of a text in one line."""
    words = " ".join(text.split())
    return words if len(words) <= most else words[:most] + " ..."


def take_forms(forms: Forms) -> None:
    """Have `forms` make the rows of those cases that are given forms; the room of states calls this."""
    _forms[:] = [forms]
    comparisons.cache_clear()


@cache
def comparisons(target: dialect.Target) -> tuple[Comparison, ...]:
    """The comparisons at small and at real widths, of all files.

    On CUDA, where a kernel is compiled for two seconds, one of each kind: the first of each width, of
    the same kernels, and of activations of the same type.
    """
    kinds: dict[tuple, list[Comparison]] = {}
    for width, case in every_case():
        comparison = Comparison(case, _launched(case, target))
        kinds.setdefault((width, comparison.kernels, case.dtype), []).append(comparison)
    most = 1 if target == "cuda" else None
    return tuple(comparison for alike in kinds.values() for comparison in alike[:most])


def every_case() -> Iterator[tuple[str, Case]]:
    """("small" or "wide", case) of all files, those that want forms once there are any."""
    for file in case_files():
        for width in ("small", "wide"):
            yield from ((width, case) for case in cases_of(file, width))


def case_files() -> list[ModuleType]:
    """The modules in `cases/`."""
    return [import_module(f"{cases.__name__}.{info.name}") for info in iter_modules(cases.__path__)]


def cases_of(file: ModuleType, width: str) -> list[Case]:
    """The cases of a file at "small" or "wide" sizes; none if it wants forms and there are none yet."""
    make = getattr(file, width, None)
    if make is None:
        return []
    wants = "forms" in signature(make).parameters
    return [] if wants and not _forms else list(make(*_forms[:wants]))


def _launched(case: Case, target: dialect.Target) -> tuple[str, ...]:
    recorder = Recorder(target, [])
    with dialect.launching(recorder):
        case.compute()
    return tuple(dict.fromkeys(launch.name for launch in recorder.launches))


def named(kernel: str, asked: str) -> bool:
    """Whether a kernel is the one asked for, or a variant of it."""
    return kernel == asked or kernel.startswith(asked + "_")


def of_kernel(target: dialect.Target, asked: str, dtype: mx.Dtype) -> list[Comparison]:
    """Those of a kernel and its variants with activations of a type, or of all types if none has it."""
    about = [c for c in comparisons(target) if any(named(kernel, asked) for kernel in c.kernels)]
    return [c for c in about if c.case.dtype == dtype] or about
