"""Quantising with error feedback: planes and loss, as `quantise` gives them, from second moments."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ds4mlx.convert.feedback import DAMPING, Moment, fed_back
from ds4mlx.convert.quantise import Loss
from ds4mlx.convert.quantise_k import Q2_K, Q4_K, Levels, Shape, q2_k_planes, q4_k_planes
from ds4mlx.convert.rounding_iq2 import IQ2Rounding
from ds4mlx.convert.rounding_k import KRounding
from ds4mlx.errors import DataError
from ds4mlx.formats import FORMATS
from ds4mlx.precision import keep_float32

Fed = Callable[[mx.array, Moment], dict[str, mx.array]]


def _fed_iq2(w: mx.array, moment: Moment) -> dict[str, mx.array]:
    rows = IQ2Rounding(w, moment)
    fed_back(w, rows, moment)
    return rows.planes()


def _fed_k(shape: Shape, planes: Callable[[Levels], dict[str, mx.array]]) -> Fed:
    def fed(w: mx.array, moment: Moment) -> dict[str, mx.array]:
        rows = KRounding(w, moment, shape)
        fed_back(w, rows, moment)
        return {plane: each.reshape(len(w), -1) for plane, each in planes(rows.stored()).items()}

    return fed


# Planes (R, elements) for w (R, D), by format.
FED: dict[str, Fed] = {
    "iq2_xxs": _fed_iq2,
    "q2_k": _fed_k(Q2_K, q2_k_planes),
    "q4_k": _fed_k(Q4_K, q4_k_planes),
}


def quantise_fed(
    values: mx.array, format: str, moment: Moment
) -> tuple[dict[str, np.ndarray], Loss]:
    """Planes of values (rows, columns) float32, and what was lost: weighted, in the outputs.

    Raises DataError if half precision cannot hold the scales.
    """
    return quantise_stack(values[None], format, moment)[0]


def quantise_stack(
    stack: mx.array, format: str, moment: Moment
) -> list[tuple[dict[str, np.ndarray], Loss]]:
    """The same of every matrix of a stack (n, rows, columns), whose inputs have the same moments.

    All rows go through each step together, as they have nothing to do with each other.
    """
    keep_float32()
    planes = _parted(FED[format](stack.flatten(0, 1), moment), len(stack))
    each = [{p: a[i] for p, a in planes.items()} for i in range(len(stack))]
    losses = [
        mx.stack(_loss(FORMATS[format].decode(one) - values, values, moment))
        for one, values in zip(each, stack, strict=True)
    ]
    sums = [Loss(*map(float, np.array(loss))) for loss in losses]
    for loss, values in zip(sums, stack, strict=True):
        if not np.isfinite(loss.error):
            raise DataError(
                f"values up to {float(mx.abs(values).max()):.3g} are too large for {format}"
            )
    arrays = {p: np.array(a) for p, a in planes.items()}
    return [({p: a[i] for p, a in arrays.items()}, loss) for i, loss in enumerate(sums)]


def _parted(planes: dict[str, mx.array], matrices: int) -> dict[str, mx.array]:
    """Planes of all rows, matrix by matrix."""
    return {p: a.reshape(matrices, -1, a.shape[-1]) for p, a in planes.items()}


def _loss(gap: mx.array, values: mx.array, moment: Moment) -> list[mx.array]:
    """The four sums of `Loss`, without what damping adds."""
    error, size = mx.square(gap).sum(), mx.square(values).sum()
    weighted = [((each @ moment.h) * each).sum() for each in (gap, values)]
    return [weighted[0] - DAMPING * error, weighted[1] - DAMPING * size, error, size]
