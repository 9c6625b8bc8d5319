"""A fast BLAS for MLX on Linux CPUs: the system's OpenBLAS, where there is one.

MLX's CPU wheel for Linux brings the reference BLAS, which multiplies float32 matrices some twenty
times slower than OpenBLAS. Whatever was loaded globally before MLX is, counts first.
"""

import contextlib
import ctypes
import sys

OPENBLAS = "libopenblas.so.0"


def prefer_openblas() -> None:
    """Load OpenBLAS before MLX is imported; nothing where it is not installed, or MLX is already."""
    if sys.platform == "linux" and "mlx.core" not in sys.modules:
        with contextlib.suppress(OSError):
            ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
