"""The name of what MLX computes on here."""

import platform
from pathlib import Path


def device() -> str:
    """The GPU's name, or the processor's."""
    import mlx.core as mx  # not before ds4mlx, which chooses its BLAS

    if mx.default_device() == mx.gpu:
        return str(mx.device_info()["device_name"])
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()
