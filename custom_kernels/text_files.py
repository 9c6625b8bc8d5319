"""Texts of kernels in files of the user's cache directory, which CUDA's compiler is told to include.

MLX goes through a kernel's whole text at every launch, to know the kernel again: 4 MB for a token of
Flash, a third of what the token costs the host. Of an included text it sees the name only. Metal's
compiler reads no files.
"""

import hashlib
from functools import cache
from pathlib import Path

from ds4mlx import durable, user_files


@cache
def included(text: str) -> str:
    """A line that includes a file with `text`; `text` itself where no file can be kept."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = user_files.cache_directory() / "kernels" / f"{digest}.cuh"
    try:
        _keep(path, text.encode())
    except OSError:
        return text
    return f'#include "{path}"\n'


def _keep(path: Path, data: bytes) -> None:
    """Have a file hold `data`. Raises OSError."""
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.put_in_place(path) as temporary:
        temporary.write_bytes(data)
