"""Kernels earn their place: each is compared with its plain operations before its first use here.

`good` answers whether kernels are used. What was never compared on this machine is compared then, in
seconds, at small and at real widths; the answers are kept (`verdicts`). A kernel that is off, that
raises or while whose comparison two processes ended is not used, which one line on stderr says.
"""

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from threading import RLock

import mlx.core as mx

from ds4mlx.custom_kernels import comparisons, dialect, verdicts
from ds4mlx.custom_kernels.comparisons import Comparison
from ds4mlx.custom_kernels.verdicts import Verdict, Verdicts
from ds4mlx.errors import DataError
from ds4mlx.precision import keep_float32

# A kernel, with all its variants whose names go on from it, and the type of the activations.
Asked = tuple[str, mx.Dtype]

_answers: dict[tuple[dialect.Target, str, mx.Dtype], bool] = {}
_kept: dict[Path, Verdicts] = {}
_noted: set[str] = set()  # the bad kernels that were told of
_lock = RLock()
_comparing: ContextVar[bool] = ContextVar("comparing", default=False)


def good(target: dialect.Target, kernels: Sequence[str], dtype: mx.Dtype) -> bool:
    """Whether all of the kernels may be used with activations of a type.

    kernels: names, each standing for its variants too. No, while kernels are compared: the plain
    operations are what they are compared with.
    """
    if _comparing.get():
        return False
    with _lock:
        unknown = [(name, dtype) for name in kernels if (target, name, dtype) not in _answers]
        if unknown:
            check(target, unknown)
        return all(_answers[target, name, dtype] for name in kernels)


def check(target: dialect.Target, asked: Iterable[Asked], *, hidden: bool | None = None) -> None:
    """Find the answers to what is asked, by comparisons where there is no verdict yet.

    hidden: whether progress is not shown; None: where stderr is no terminal. Raises DataError if the
    GPU does nothing any more after a kernel's launch.
    """
    with _lock:
        asked, known = list(dict.fromkeys(asked)), _here()
        if _unknown(known, asked):
            with known.alone():
                unknown = _unknown(known, asked)
                known.asked |= {label(*each): _kernels(target, *each) for each in unknown}
                _compare(known, _missing(known, target, unknown), hidden)
        for name, dtype in asked:
            _answers[target, name, dtype] = _answer(known, label(name, dtype))


def forget() -> None:
    """Compare all again when asked. Raises OSError."""
    with _lock:
        verdicts.place().unlink(missing_ok=True)
        for part in (_answers, _kept, _noted):
            part.clear()


def _here() -> Verdicts:
    """What this process knows, from the file or by itself."""
    place = verdicts.place()
    if place not in _kept:
        _kept[place] = verdicts.here()
    return _kept[place]


def label(kernel: str, dtype: mx.Dtype) -> str:
    """What a verdict is called: the kernel's name and the type of the activations."""
    return f"{kernel} {str(dtype).rpartition('.')[2]}"


def labels(comparison: Comparison) -> list[str]:
    """The verdicts that a comparison bears on."""
    return [label(kernel, comparison.case.dtype) for kernel in comparison.kernels]


def _unknown(known: Verdicts, asked: Iterable[Asked]) -> list[Asked]:
    """Those of which it is not known what they stand for, or how good that is."""
    names = {each: known.asked.get(label(*each)) for each in asked}
    return [each for each, of in names.items() if of is None or not set(of) <= known.known.keys()]


def _kernels(target: dialect.Target, asked: str, dtype: mx.Dtype) -> list[str]:
    """The verdicts that what is asked depends on."""
    about = comparisons.of_kernel(target, asked, dtype)
    pairs = ((kernel, c.case.dtype) for c in about for kernel in c.kernels)
    return sorted(
        {label(kernel, type) for kernel, type in pairs if comparisons.named(kernel, asked)}
    )


def _missing(known: Verdicts, target: dialect.Target, asked: Iterable[Asked]) -> list[Comparison]:
    """The comparisons of kernels on which there is no verdict yet."""
    each = [c for name, dtype in asked for c in comparisons.of_kernel(target, name, dtype)]
    return list(dict.fromkeys(c for c in each if not set(labels(c)) <= known.known.keys()))


def _compare(known: Verdicts, missing: list[Comparison], hidden: bool | None) -> None:
    """Run comparisons, those of single kernels first, and add the verdicts."""
    from tqdm import tqdm

    keep_float32()
    ordered = sorted(missing, key=lambda c: (len(c.kernels), labels(c)))
    passed = [{name} for name, verdict in known.known.items() if verdict.good]
    token = _comparing.set(True)
    try:
        with dialect.launching(None):  # on the device, whoever asks
            for comparison in tqdm(ordered, "comparing kernels", disable=hidden, leave=False):
                _one(known, comparison, passed)
        good = set().union(*passed)
        for name in dict.fromkeys(name for comparison in ordered for name in labels(comparison)):
            alone = Verdict(name in good, "" if name in good else "it goes with a bad one")
            known.known.setdefault(name, alone)
    finally:
        _comparing.reset(token)
        known.write()  # nothing is being tried any more


def _one(known: Verdicts, comparison: Comparison, passed: list[set[str]]) -> None:
    """Run one comparison, unless it takes a bad kernel. `passed`: the kernels of those that were good.

    A fault is that of all its kernels that were not good without another of them. Raises DataError if
    nothing can be computed any more.
    """
    names = labels(comparison)
    if not all(known.known.get(name, Verdict(True)).good for name in names):
        return
    tried = [name for name in names if not any(name in p for p in passed)] or names
    if known.trying != tried:
        known.write(tried)
    fault = comparison.fault()
    if fault is None:
        passed.append(set(names))
        return
    suspects = [n for n in names if not any(n in p and not p.issuperset(names) for p in passed)]
    known.known |= {name: Verdict(False, fault) for name in suspects or names}
    if not _computes():
        raise DataError(
            f"the GPU computes nothing any more since {names[-1]} was tried; start again, and it is "
            f"not used"
        )


def _computes() -> bool:
    """Whether the device still works: after some faults nothing does until the process ends."""
    try:
        return bool((mx.ones((2,)) + 1 == 2).all())
    except Exception:  # noqa: BLE001 - whatever a driver raises
        return False


def _answer(known: Verdicts, asked: str) -> bool:
    """Whether all that is asked about is good; says so on stderr, once, if not."""
    names = known.asked[asked]
    faults = {name: known.known[name].why for name in names if not known.known[name].good}
    if not names:
        faults = {asked: "nothing compares it"}
    for name in sorted(faults.keys() - _noted):
        verdicts.note(f"plain operations stand for the kernel {name} here: {faults[name]}")
    _noted.update(faults)
    return not faults
