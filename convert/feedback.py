"""Rounding with error feedback: second moments of a layer's inputs, and the first pass and descent.

Where the inputs x have the second moments H, the mean of x x^T, rounding weights W to Q changes the
outputs by the mean square tr (W - Q) H (W - Q)^T. Columns are rounded a group at a time; what is then
wrong is made good, as far as the inputs of columns go together, by those not rounded yet. A descent
then changes groups and scales one at a time where it helps. What a format can store is a `Rounding`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import mlx.core as mx
import numpy as np

# Columns that are rounded together, and that share a scale in half precision.
GROUP, BLOCK = 32, 256
# Share of the mean diagonal that is added to all of it: inputs that were not seen count too.
DAMPING = 0.1
SWEEPS = 3


@dataclass(frozen=True)
class Moment:
    """Second moments of D columns, scaled to a mean diagonal of 1 and damped; float32.

    h: H (D, D). inverses, eighths: those of its blocks of 32 and of 8 on the diagonal, (D / 32, 32, 32)
    and (D / 8, 8, 8). order: groups by
    falling energy, int (D / 32,). root: upper triangular, root root^T = H in that order, which makes
    e root[k, k] the error of group k once the groups behind it have made it good; they do so by
    t -= (e root[k, k]) inverse[k, behind], where `inverse` is that of the root.
    """

    h: mx.array
    inverses: mx.array
    eighths: mx.array
    order: np.ndarray
    root: mx.array
    inverse: mx.array

    @cached_property
    def own(self) -> list[mx.array]:
        """The blocks of 32 on H's diagonal, as arrays of their own, which no kernel has to copy."""
        return _pieces(self.h[at, at] for at in _groups(self.h))

    @cached_property
    def beside(self) -> list[mx.array]:
        """The same with all columns of their blocks of 256, (32, 256)."""
        return _pieces(self.h[at, _block(at)] for at in _groups(self.h))

    @cached_property
    def roots(self) -> list[tuple[mx.array, mx.array, mx.array]]:
        """In the moment's order of every group its own blocks of root and inverse, and the rest of the
        inverse in its block of 256, (32, up to 224)."""
        groups = _groups(self.h)
        sides = (self.root[at, at] for at in groups), (self.inverse[at, at] for at in groups)
        behind = (self.inverse[at, at.stop : _block(at).stop] for at in groups)
        return list(zip(*map(_pieces, (*sides, behind)), strict=True))

    @classmethod
    def of(cls, sums: np.ndarray) -> "Moment":
        """From sums of x x^T over any number of inputs, (D, D).

        Raises LinAlgError if they are no such sums, or all 0.
        """
        columns, energy = len(sums), np.trace(sums, dtype=np.float64)
        if not energy > 0:
            raise np.linalg.LinAlgError("no energy")
        h = sums * (columns / energy)
        h = (h + h.T) / 2 + DAMPING * np.eye(columns)
        order = np.argsort(-np.diag(h).reshape(-1, GROUP).sum(-1), kind="stable")
        backward = columns_of(order)[::-1]
        # A Cholesky factor backwards is the upper triangular one.
        root = np.linalg.cholesky(h[np.ix_(backward, backward)])[::-1, ::-1]
        found = (h, inverses(h, GROUP), inverses(h, 8), root, inverted(root))
        h, groups, eighths, root, inverse = (mx.array(a.astype(np.float32)) for a in found)
        return cls(h, groups, eighths, order, root, inverse)


def _groups(h: mx.array) -> list[slice]:
    return [slice(a, a + GROUP) for a in range(0, len(h), GROUP)]


def _block(group: slice) -> slice:
    """The block of 256 that a group is in."""
    start = group.start // BLOCK * BLOCK
    return slice(start, start + BLOCK)


def _pieces(slices: Iterable[mx.array]) -> list[mx.array]:
    pieces = [mx.contiguous(each) for each in slices]
    mx.eval(pieces)
    return pieces


def inverses(h: np.ndarray, side: int) -> np.ndarray:
    """Those of the blocks on the diagonal of h (D, D), (D / side, side, side)."""
    blocks = h.reshape(-1, side, len(h) // side, side)
    return np.linalg.inv(blocks.diagonal(axis1=0, axis2=2).transpose(2, 0, 1))


def inverted(upper: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangular matrix, by halves: a fraction of the work of any matrix."""
    middle = len(upper) // 2
    if middle < BLOCK:
        return np.linalg.inv(upper)
    a, c = inverted(upper[:middle, :middle]), inverted(upper[middle:, middle:])
    corner = -a @ upper[:middle, middle:] @ c
    return np.block([[a, corner], [np.zeros_like(corner.T), c]])


class Rounding(Protocol):
    """How rows R of D columns are stored so far, in groups of 32 and blocks of 256 of one scale."""

    def round_group(self, k: int, x: mx.array, root: mx.array, inverse: mx.array) -> mx.array:
        """Store x (R, 32) as group k; the error times the root (R, 32).

        root, inverse (32, 32): the group's own blocks of both. Errors of columns may be made good
        by those behind them in the group.
        """
        ...

    def change_group(self, k: int, g: mx.array, h: mx.array) -> mx.array:
        """Change group k where that lowers the error; the change of its values (R, 32).

        g (R, 32): the gradient (W - Q) H there; h (32, 32): the group's block of H.
        """
        ...

    def refit(self, block: int, g: mx.array, h: mx.array) -> None:
        """Give a block the scales with the lowest error; g (R, 256), h (256, 256)."""
        ...

    def values(self, block: int) -> mx.array:
        """What is stored of a block, (R, 256)."""
        ...


def fed_back(w: mx.array, stored: Rounding, moment: Moment) -> mx.array:
    """Have `stored` hold w (R, D) as well as it can; the gradient (W - Q) H in the end."""
    first_pass(w, stored, moment)
    return descend(w, stored, moment)


def first_pass(w: mx.array, stored: Rounding, moment: Moment) -> None:
    """Round group by group, in the moment's order. Errors reach other panels of 256 all at once."""
    rest = w[:, mx.array(columns_of(moment.order))]
    for start in range(0, w.shape[1], BLOCK):
        panel, errors, end = rest[:, :BLOCK], [], start + BLOCK
        for a in range(start, end, GROUP):
            k, (root, inverse, behind) = int(moment.order[a // GROUP]), moment.roots[a // GROUP]
            errors.append(stored.round_group(k, panel[:, :GROUP], root, inverse))
            mx.eval(errors[-2:-1])  # no more than a group ahead of the device: candidates are large
            if a + GROUP < end:
                panel = mx.addmm(panel[:, GROUP:], errors[-1], behind, alpha=-1)
        if end < w.shape[1]:
            behind, error = moment.inverse[start:end, end:], mx.concatenate(errors, -1)
            rest = mx.addmm(rest[:, BLOCK:], error, behind, alpha=-1)
        mx.async_eval(rest, errors)


def descend(w: mx.array, stored: Rounding, moment: Moment) -> mx.array:
    """Refit the scales, then sweep over the groups and refit; gives the gradient.

    The error of a change is exact, as the gradient is kept up to date.
    """
    blocks = range(w.shape[1] // BLOCK)
    gradient = (w - mx.concatenate([stored.values(block) for block in blocks], -1)) @ moment.h
    for sweep in range(SWEEPS + 1):
        for block in blocks:
            own, before = slice(block * BLOCK, (block + 1) * BLOCK), stored.values(block)
            g, h = gradient[:, own], moment.h[own, own]
            for a in range(0, BLOCK, GROUP) if sweep else ():
                k = (own.start + a) // GROUP
                change = stored.change_group(k, g[:, a : a + GROUP], moment.own[k])
                g = _after(mx.addmm(g, change, moment.beside[k], alpha=-1), g)
            stored.refit(block, g, h)
            change = stored.values(block) - before
            gradient = _after(mx.addmm(gradient, change, moment.h[own], alpha=-1), gradient)
    return gradient


def _after(new: mx.array, old: mx.array) -> mx.array:
    """A new array that is begun, when the old one is done."""
    mx.async_eval(new)
    mx.eval(old)
    return new


def columns_of(groups: np.ndarray) -> np.ndarray:
    """The columns of groups, one group after another."""
    return (groups[:, None] * GROUP + np.arange(GROUP)).ravel()


def fused(function: Callable) -> Callable:
    """The function with its kernels fused, where there is a GPU: on a CPU that compiles for seconds."""
    return _compiled(function) if mx.default_device() == mx.gpu else function


@cache
def _compiled(function: Callable) -> Callable:
    return mx.compile(function)
