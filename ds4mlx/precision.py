"""Float32 products in float32: TF32, which MLX's GPUs may use instead, is off before the first one.

The router, the hyper-connections, the softmax and the quantisers compute in float32 on purpose. MLX
multiplies float32 matrices in TF32 on NVIDIA GPUs and on Apple's since the M5, three digits less
exact, unless $MLX_ENABLE_TF32 is 0 when it makes its first product on a GPU; later it does not look.
"""

import os
import warnings
from functools import cache

import mlx.core as mx

VARIABLE = "MLX_ENABLE_TF32"


def keep_float32() -> None:
    """Turn TF32 off for this process; where it is too late, warn and name the variable.

    Whoever has set the variable to 1 has TF32, unwarned.
    """
    wanted = os.environ.setdefault(VARIABLE, "0") == "0"
    if wanted and mx.default_device() == mx.gpu and gpu_rounds():
        warnings.warn(
            f"float32 products are rounded to TF32, as MLX had made one before ds4mlx could turn "
            f"that off: set {VARIABLE}=0 before Python starts, or load the model first",
            RuntimeWarning,
            stacklevel=3,
        )


@cache
def gpu_rounds() -> bool:
    """Whether float32 products on the GPU lose what TF32 has no room for."""
    fine = mx.full((256, 256), 1 + 2**-12, stream=mx.gpu)
    product = mx.matmul(fine, mx.eye(256, stream=mx.gpu), stream=mx.gpu)
    return not mx.array_equal(product, fine, stream=mx.gpu).item()
