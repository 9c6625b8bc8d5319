"""Rows in IQ2_XXS while they are rounded with error feedback: their scales and their groups' codes."""

import mlx.core as mx

from ds4mlx.convert.feedback import BLOCK, GROUP, Moment
from ds4mlx.convert.fitting import halved, safe_divide
from ds4mlx.convert.quantise_iq2 import stored
from ds4mlx.custom_kernels.codes.iq2_feedback import TOP_LEVEL, Codes, changed, searched, typical
from ds4mlx.custom_kernels.codes.iq2_nearest import signs_of

PER_BLOCK = BLOCK // GROUP
# How far above the size of a block's largest group its scale begins, as what is made good adds to it.
ROOM = 1.3


class IQ2Rounding:
    """A `Rounding`. d: the scales of every block, (R,); codes: of every group."""

    def __init__(self, w: mx.array, moment: Moment):
        self.moment, self.d = moment, first_scales(w, moment)
        self.codes = [Codes(*[mx.zeros(1)] * 3)] * (w.shape[1] // GROUP)

    def round_group(self, k: int, x: mx.array, root: mx.array, inverse: mx.array) -> mx.array:
        self.codes[k], error = searched(x, self.d[k // PER_BLOCK], root, inverse)
        mx.async_eval(error, self.codes[k])  # lets go of the candidates
        return error

    def change_group(self, k: int, g: mx.array, h: mx.array) -> mx.array:
        old, d = self.codes[k], self.d[k // PER_BLOCK]
        inverses = self.moment.inverses[k], self.moment.eighths[4 * k : 4 * k + 4]
        self.codes[k] = changed(old, g, d, h, *inverses)
        mx.async_eval(self.codes[k])
        return self.codes[k].values - old.values

    def refit(self, block: int, g: mx.array, h: mx.array) -> None:
        self.d[block], factor = refitted(self.values(block), g, self.d[block], h)
        for k in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
            self.codes[k] = self.codes[k]._replace(values=self.codes[k].values * factor)

    def values(self, block: int) -> mx.array:
        mine = self.codes[block * PER_BLOCK : (block + 1) * PER_BLOCK]
        return mx.concatenate([each.values for each in mine], -1)

    def planes(self) -> dict[str, mx.array]:
        """Planes (R, elements)."""
        level = mx.stack([each.level for each in self.codes], 1)
        points = mx.stack([each.points for each in self.codes], 1)
        d = mx.stack(self.d, 1).reshape(-1, 1)
        minus = signs_of(points).reshape(-1, 8)
        blocks = stored(minus, d, level.reshape(-1, PER_BLOCK), (points & 255).reshape(-1))
        return {plane: each.reshape(len(level), -1) for plane, each in blocks.items()}


def first_scales(w: mx.array, moment: Moment) -> list[mx.array]:
    """Scales of every block, (R,), with some room above the size of its largest group."""
    weights = mx.diag(moment.h).reshape(-1, GROUP)
    groups = w.reshape(len(w), -1, GROUP)
    rms = mx.sqrt((weights * groups * groups).sum(-1) / weights.sum(-1))
    largest = rms.reshape(len(w), -1, PER_BLOCK).max(-1)
    d = halved(ROOM * largest / (typical() * (2 * TOP_LEVEL + 1)))
    return [d[:, block] for block in range(d.shape[1])]


def refitted(values: mx.array, g: mx.array, d: mx.array, h: mx.array) -> tuple[mx.array, mx.array]:
    """The best scale (R,) of a block in half precision, where that is better, and its factor (R, 1)."""
    slope, curve = (values * g).sum(-1), ((values @ h) * values).sum(-1)
    new = halved(d * (1 + safe_divide(slope, curve)))
    share = safe_divide(new, d) - 1
    better = (new > 0) & (share * share * curve < 2 * share * slope)
    return mx.where(better, new, d), mx.where(better, 1 + share, 1)[:, None]
