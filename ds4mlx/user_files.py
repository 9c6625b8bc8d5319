"""Where a user's files are kept that a program can make again."""

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """The folder of ds4mlx: in `$XDG_CACHE_HOME`, or where the system keeps such files."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "ds4mlx"
    library = Path.home() / "Library" / "Caches"
    return (library if sys.platform == "darwin" else Path.home() / ".cache") / "ds4mlx"


def kv_directory() -> Path:
    """The KV store's place where no other is named."""
    return cache_directory() / "kv"
