"""A fast BLAS for MLX on Linux CPUs: the system's OpenBLAS, where there is one.

MLX's CPU wheel for Linux brings the reference BLAS, which multiplies float32 matrices some twenty
times slower than OpenBLAS. The two differ in last bits, so that what a command writes would depend
on what is installed and on which of mlx and ds4mlx was imported first: only `ds4mlx eval`, whose
figures do not reach that far, takes OpenBLAS unasked. DS4MLX_OPENBLAS=1 takes it everywhere, 0
nowhere.
"""

import contextlib
import ctypes
import os
import sys

OPENBLAS = "libopenblas.so.0"


def use_openblas(*, unasked: bool = False) -> None:
    """Load OpenBLAS for MLX to use, where it is installed and asked for.

    unasked: also where $DS4MLX_OPENBLAS says nothing. Does nothing once MLX is imported, which has
    its products by then.
    """
    wanted = os.environ.get("DS4MLX_OPENBLAS", "1" if unasked else "0") != "0"
    if wanted and sys.platform == "linux" and "mlx.core" not in sys.modules:
        with contextlib.suppress(OSError):
            ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)


def is_fast() -> bool:
    """Whether products are fast on this machine's CPU, as far as the BLAS decides."""
    if sys.platform != "linux":
        return True
    try:
        ctypes.CDLL(OPENBLAS, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True
