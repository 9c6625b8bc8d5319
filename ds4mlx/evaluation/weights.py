"""Weights decoded to plain float32, for measuring: the values stay, the products become faster.

On a CPU a product with quantised weights is several times slower than one with the values that they
stand for. Only small models fit that way.
"""

import mlx.core as mx

from ds4mlx.formats import FORMATS
from ds4mlx.model.linear import Matrix
from ds4mlx.model.model import Model

# Weights of a model that is decoded as a whole, 4 bytes each.
MOST = 1 << 29


def decode_weights(model: Model) -> None:
    """Hold every matrix as the float32 values of its stored form, if they are not too many."""
    matrices = [
        module
        for _, module in model.named_modules()
        if isinstance(module, Matrix) and module.format != "i32"
    ]
    if sum(map(count, matrices)) > MOST:
        return
    for matrix in matrices:
        replace_values(matrix, matrix.decode())


def count(matrix: Matrix) -> int:
    """Weights of a matrix, or of a stack of them."""
    return round(
        8 * sum(plane.nbytes for plane in matrix.planes.values()) / FORMATS[matrix.format].bits
    )


def replace_values(matrix: Matrix, values: mx.array) -> None:
    """Hold other values, float32 in the logical shape, as the transpose that multiplies faster."""
    values = mx.contiguous(values.swapaxes(-1, -2)).swapaxes(-1, -2)
    mx.eval(values)
    matrix.store("f32")
    matrix.weight = values
