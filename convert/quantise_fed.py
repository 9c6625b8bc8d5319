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
    keep_float32()
    found = FED[format](values, moment)
    loss = Loss(*map(float, _loss(FORMATS[format].decode(found) - values, values, moment)))
    if not np.isfinite(loss.error):
        raise DataError(
            f"values up to {float(mx.abs(values).max()):.3g} are too large for {format}"
        )
    return {plane: np.array(each) for plane, each in found.items()}, loss


def _loss(gap: mx.array, values: mx.array, moment: Moment) -> list[mx.array]:
    """The four sums of `Loss`, without what damping adds."""
    error, size = mx.square(gap).sum(), mx.square(values).sum()
    weighted = [((each @ moment.h) * each).sum() for each in (gap, values)]
    return [weighted[0] - DAMPING * error, weighted[1] - DAMPING * size, error, size]
