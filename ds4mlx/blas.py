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


def choose_blas() -> bool:
    """Load OpenBLAS if it is wanted and installed; too late once MLX is imported.

    Returns whether products are fast on this machine's CPU, as far as depends on that.
    """
    if sys.platform != "linux":
        return True
    program = "".join(sys.argv[:1])  # "-m" while `python -m ds4mlx` imports the package
    evaluates = (program == "-m" or program.endswith("ds4mlx")) and "eval" in sys.argv[1:3]
    wanted = os.environ.get("DS4MLX_OPENBLAS", "1" if evaluates else "0") != "0"
    if wanted and "mlx.core" not in sys.modules:
        with contextlib.suppress(OSError):
            ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
            return True
    return False
