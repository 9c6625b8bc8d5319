"""How much MLX hands an NVIDIA GPU at a time: launches by their number, not by what they could read.

MLX ends a graph of CUDA's once its inputs are more than some megabytes, and counts the whole of every
array: each product with the experts of a layer, of which it reads a few, would end one, and every end
costs the host. What a graph has made is kept until its end, which training would need memory for: so
it is commands that generate, by kernels, that have longer ones. MLX looks at $MLX_MAX_MB_PER_BUFFER when
it first uses the GPU.
"""

import os

import mlx.core as mx

VARIABLE = "MLX_MAX_MB_PER_BUFFER"


def submit_by_number() -> None:
    """Have graphs of CUDA's end by the number of their launches, unless the variable says how else.

    On Metal, where it was never measured, nothing changes.
    """
    if not mx.metal.is_available():
        os.environ.setdefault(VARIABLE, str(10**6))
