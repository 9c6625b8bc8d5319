"""Comparing the kernels of a model before it is used, all at once."""

from collections.abc import Callable

from ds4mlx.custom_kernels import dialect, dispatch, self_check
from ds4mlx.custom_kernels.recording import recording


def prepare(build: Callable[[], object]) -> None:
    """Compare what `build`, which builds a graph and evaluates nothing, asks for.

    Where a kernel is bad, that is also what stands for it, which may be other kernels. Does nothing where no verdict is needed. Raises DataError as `self_check.check` does.
    """
    target = dialect.target()
    if target is None or dispatch.decided() is not None:
        return
    with dispatch.asking() as asked, recording(target):
        build()
    self_check.check(target, sorted(asked, key=str))
    if not all(self_check.good(target, [name], dtype) for name, dtype in asked):
        with recording(target, every=False):
            build()
