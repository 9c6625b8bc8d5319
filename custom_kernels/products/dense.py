"""The product with one stored matrix, or with several side by side: kernel or plain.

A few rows of activations are multiplied by the stored codes. For more the matrix is decoded to the
activations' type, a bounded part at a time, and MLX multiplies: its product of plain values is near
what a GPU can do, and what it takes longer than one of codes could is made up for within some rows.
"""

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.products import dense_matvec
from ds4mlx.custom_kernels.products.decode import decode
from ds4mlx.formats import FORMATS, Planes

# Decoded: formats of which no kernel reads many rows' worth of codes as fast.
DECODED = ("mxfp8", "mxfp4", "q8_0", "q4_k", "q2_k", "iq2_xxs")
SCRATCH = 1 << 26  # values that are decoded at a time; all of a matrix of Flash


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
    """Whether a kernel reads a matrix in a format for x (n, in) or (G, n, in)."""
    if x.shape[-2] <= dense_matvec.MOST:
        return dense_matvec.fits([stored], _few(x))
    return stored in DECODED and dispatch.active(x, f"decode_{stored}")


def by_kernel(stored: str, planes: Planes, x: mx.array) -> mx.array:
    """x (n, in) by planes of (out, in), or (G, n, in) by (G, out, in)."""
    if x.shape[-2] <= dense_matvec.MOST:
        rows = {plane: array.reshape(-1, array.shape[-1]) for plane, array in planes.items()}
        few = _few(x)
        out = dense_matvec.by_kernel([(stored, rows)], few, x.dtype)
        return _few(out.reshape(*few.shape[:-1], -1))
    return by_decoding(stored, planes, x)


def by_decoding(stored: str, planes: Planes, x: mx.array) -> mx.array:
    """The same for many rows, of a matrix SCRATCH values at a time, or at least a row or a group."""
    weight, parts = planes["weight"], []
    stacked = weight.ndim == 3
    each = max(1, SCRATCH // (x.shape[-1] * (weight.shape[1] if stacked else 1)))
    for start in range(0, len(weight), each):
        part = {plane: array[start : start + each] for plane, array in planes.items()}
        if parts:  # in turn, so that one decoded part is alive at a time
            part["weight"] = mx.depends([part["weight"]], parts[-1:])[0]
        values = decode(stored, part, x.dtype)
        rows = x[start : start + each] if stacked else x
        parts.append(rows @ mx.swapaxes(values, -1, -2))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0 if stacked else -1)


def _few(x: mx.array) -> mx.array:
    """Rows (n, ...) or (G, n, ...) as `dense_matvec` has them, and back: the row comes first."""
    return x if x.ndim == 2 else x.swapaxes(0, 1)
