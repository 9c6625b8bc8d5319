"""The product with one stored matrix, or with several side by side: kernel or plain."""

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.products import dense_matvec, q8_matmul
from ds4mlx.formats import FORMATS, Planes


def product(stored: str, planes: Planes, x: mx.array) -> mx.array:
    """x . W^T of planes in a format, in x's type.

    x (..., in) -> (..., out), or for planes of (G, out, in): (G, n, in) -> (G, n, out).
    """
    stacked = planes["weight"].ndim == 3
    rows = x if stacked else x.reshape(-1, x.shape[-1])
    if not takes(stored, rows):
        return FORMATS[stored].matmul(planes, x)
    return by_kernel(stored, planes, rows).reshape(*x.shape[:-1], -1)


def takes(stored: str, x: mx.array) -> bool:
    """Whether a kernel multiplies x (n, in) or (G, n, in) by a matrix in a format."""
    if x.shape[-2] <= dense_matvec.MOST:
        return dense_matvec.fits([stored], _few(x))
    suits = stored == "q8_0" and x.shape[-1] % staging.CHUNK == 0
    return suits and dispatch.active(x, "matmul_q8_0")


def by_kernel(stored: str, planes: Planes, x: mx.array) -> mx.array:
    """x (n, in) by planes of (out, in), or (G, n, in) by (G, out, in); many rows only in Q8_0."""
    if x.shape[-2] <= dense_matvec.MOST:
        rows = {plane: array.reshape(-1, array.shape[-1]) for plane, array in planes.items()}
        return _few(dense_matvec.by_kernel([(stored, rows)], _few(x), x.dtype)[0])
    most = dispatch.most_tokens(x.size // x.shape[-2])
    return dispatch.in_pieces(lambda part: q8_matmul.q8_matmul(planes, part), most, x, axis=-2)


def _few(x: mx.array) -> mx.array:
    """Rows (n, ...) or (G, n, ...) as `dense_matvec` has them, and back: the row comes first."""
    return x if x.ndim == 2 else x.swapaxes(0, 1)
