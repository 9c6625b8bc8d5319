"""The product with one stored matrix, or with several side by side: kernel or plain."""

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.products import q8_matmul, q8_matvec
from ds4mlx.formats import FORMATS, Planes


def product(stored: str, planes: Planes, x: mx.array) -> mx.array:
    """x . W^T of planes in a format, in x's type.

    x (..., in) -> (..., out), or for planes of (G, out, in): (G, n, in) -> (G, n, out).
    """
    stacked = planes["weight"].ndim == 3
    rows = x if stacked else x.reshape(-1, x.shape[-1])
    if not takes(stored, rows):
        return FORMATS[stored].matmul(planes, x)
    return by_kernel(planes, rows).reshape(*x.shape[:-1], -1)


def takes(stored: str, x: mx.array) -> bool:
    """Whether a kernel multiplies x (..., n, in) by a matrix in a format."""
    kernel = "q8_matvec" if x.shape[-2] <= q8_matvec.MOST else "matmul_q8_0"
    return stored == "q8_0" and x.shape[-1] % staging.CHUNK == 0 and dispatch.active(x, kernel)


def by_kernel(planes: Planes, x: mx.array) -> mx.array:
    """x (n, in) by planes of (out, in), or (G, n, in) by (G, out, in), in Q8_0."""
    if x.shape[-2] <= q8_matvec.MOST:
        return q8_matvec.q8_matvec(planes, x)
    most = dispatch.most_tokens(x.size // x.shape[-2])
    return dispatch.in_pieces(lambda part: q8_matmul.q8_matmul(planes, part), most, x, axis=-2)
