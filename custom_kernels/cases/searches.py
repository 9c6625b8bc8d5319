"""Searches among stored points beside their references."""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels.cases.base import Case, Pairs, normal
from ds4mlx.custom_kernels.codes import iq2_feedback
from ds4mlx.custom_kernels.codes.iq2_feedback import GROUP, Codes


def moment(seed: int) -> tuple[mx.array, mx.array, mx.array]:
    """Second moments (32, 32) of columns that go together, an upper triangular root, and its inverse."""
    mixed = np.random.default_rng(seed).standard_normal((GROUP, GROUP)) / 6 + np.eye(GROUP)
    h = mixed @ mixed.T + 0.1 * np.eye(GROUP)
    root = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    found = (h, root, np.linalg.inv(root))
    return tuple(mx.array(np.ascontiguousarray(each, np.float32)) for each in found)  # type: ignore[return-value]


def searched(rows: int) -> Pairs:
    """Groups of a first pass: of few, rounding decides the codes."""
    _, root, inverse = moment(4)
    x, d = normal((rows, GROUP), mx.float32, 5), 0.02 + 0.1 * mx.abs(normal((rows,), mx.float32, 6))
    (got, off), (want, error) = (
        side(x, d, root, inverse)
        for side in (iq2_feedback.searched_by_kernel, iq2_feedback.searched_plain)
    )
    return [*alike(got, want), *but_for_few(off, error)]


def changed(rows: int) -> Pairs:
    """Groups of a descent, some of which get other codes."""
    h, root, inverse = moment(7)
    x, d = normal((rows, GROUP), mx.float32, 8), 0.02 + 0.1 * mx.abs(normal((rows,), mx.float32, 9))
    old, _ = iq2_feedback.searched_plain(x, d, root, inverse)
    gradient = (x - old.values) @ h + normal((rows, GROUP), mx.float32, 10, 0.3)
    blocks = np.array(h).reshape(4, 8, 4, 8).diagonal(axis1=0, axis2=2).transpose(2, 0, 1)
    inverses = [mx.array(np.linalg.inv(each).astype(np.float32)) for each in (np.array(h), blocks)]
    got, want = (
        side(old, gradient, d, h, *inverses)
        for side in (iq2_feedback.changed_by_kernel, iq2_feedback.changed_plain)
    )
    return alike(got, want)


def alike(got: Codes, want: Codes) -> Pairs:
    """The parts of codes, but for a few rows."""
    return [pair for a, b in zip(got, want, strict=True) for pair in but_for_few(a, b)]


def but_for_few(got: mx.array, want: mx.array) -> Pairs:
    """Rows of both; of those that are not the same, one in thirty counts for nothing."""
    a, b = (side.astype(mx.float32).reshape(len(side), -1) for side in (got, want))
    other = mx.abs(a - b).max(-1) > 1e-4 * (1 + mx.abs(b).max(-1))
    few = other & (other.sum() <= max(1, len(other) // 30))
    return [(mx.where(few[:, None], b, a), b)]


def small() -> Iterator[Case]:
    """More rows than a threadgroup has, and fewer."""
    for rows in (67, 5):
        yield Case(f"iq2_searched {rows}", mx.float32, partial(searched, rows))
        yield Case(f"iq2_changed {rows}", mx.float32, partial(changed, rows))


def wide() -> Iterator[Case]:
    """The rows of a matrix of Flash."""
    yield Case("iq2_searched 2048", mx.float32, partial(searched, 2048))
    yield Case("iq2_changed 2048", mx.float32, partial(changed, 2048))
