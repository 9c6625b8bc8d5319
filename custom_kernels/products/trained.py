"""Products with stored weights in training: as functions of activations, whose gradients they have.

A weight that is decoded is decoded again for the gradient, so that no values of it are kept from one
to the other. Nothing is read on the host, so that a step can be traced by `mx.compile`. Weights that
are plain values have gradients themselves, and are multiplied as ever.
"""

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.products import dense
from ds4mlx.custom_kernels.products.decode import decode
from ds4mlx.formats import BLOCK_FORMATS, FORMATS, Planes
from ds4mlx.formats.dense import Dense, dense_format

SCRATCH = 1 << 29  # values of experts that are decoded at a time, or at least those of one


def product(stored: str, planes: Planes, x: mx.array) -> mx.array:
    """`dense.product`, of whose codes nothing but the gradient of x is asked."""
    if isinstance(FORMATS[stored], Dense):
        return dense.product(stored, planes, x)
    return mx.checkpoint(lambda x: dense.product(stored, planes, x))(x)


def gather(stored: str, planes: Planes, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
    """`Format.gather`: x (..., 1, in), experts int (...) -> (..., 1, out); `ordered`: they ascend.

    Of formats that are decoded, some experts after the other, all rows with each; a row keeps what its
    own expert gives.
    """
    kernel = stored in dense.DECODED and dispatch.active(x, f"decode_{stored}")
    if not kernel and stored not in BLOCK_FORMATS:
        return FORMATS[stored].gather(planes, x, experts, ordered)
    count, out, _ = planes["weight"].shape
    each, parts = max(1, SCRATCH // (out * x.shape[-1])), []
    for first in range(0, count, each):
        part = {plane: array[first : first + each] for plane, array in planes.items()}
        if parts:  # in turn, so that one part's values are alive at a time
            codes = mx.depends([part["weight"]], parts[-1:])[0]
            part["weight"] = mx.stop_gradient(codes)  # or the order would carry one
        some = experts.astype(mx.int32) - first
        parts.append(_of_some(stored, part, x, some, ordered, kernel))
    return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


def _of_some(
    stored: str, planes: Planes, x: mx.array, experts: mx.array, ordered: bool, kernel: bool
) -> mx.array:
    """The products with some experts, numbered from 0; zero in rows of others."""
    last = len(planes["weight"]) - 1
    inside = mx.clip(experts, 0, last)
    own = (inside == experts)[..., None, None]

    def multiply(x: mx.array) -> mx.array:
        values = decode(stored, planes, x.dtype) if kernel else FORMATS[stored].decode(planes)
        plain = FORMATS[dense_format(values.dtype)]
        return mx.where(own, plain.gather({"weight": values}, x, inside, ordered), 0)

    return mx.checkpoint(multiply)(x)
