"""Products by decoding: to float32 what is needed, and multiply.

The reference that kernels are checked against, and the path of devices without kernels.
"""

import mlx.core as mx
import numpy as np

from ds4mlx.formats.base import Format, Planes


def decoded_matmul(stored: Format, planes: Planes, x: mx.array) -> mx.array:
    """`Format.matmul` in plain operations."""
    weight = stored.decode(planes)
    return (x.astype(mx.float32) @ mx.swapaxes(weight, -1, -2)).astype(x.dtype)


def expert_by_expert(stored: Format, planes: Planes, x: mx.array, experts: mx.array) -> mx.array:
    """`Format.gather`, each expert decoded once; needs the experts' ids on the host."""
    chosen = np.array(experts)
    x = mx.broadcast_to(x, (*experts.shape, *x.shape[-2:]))
    rows, flat = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
    order = np.argsort(flat, kind="stable")
    starts = np.flatnonzero(np.diff(flat[order], prepend=-1))
    parts: list[mx.array] = []
    for places in np.split(order, starts[1:]):
        one = {plane: array[int(flat[places[0]])] for plane, array in planes.items()}
        if parts:  # in turn, so that one decoded expert is alive at a time
            codes = mx.depends([one["weight"]], parts[-1:])[0]
            one["weight"] = mx.stop_gradient(codes)  # or the order would carry one
        parts.append(decoded_matmul(stored, one, rows[mx.array(places)]))
    out = mx.concatenate(parts)[mx.array(np.argsort(order))]
    return out.reshape(*chosen.shape, 1, -1)
