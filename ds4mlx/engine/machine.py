"""The machine that the model runs on: its memory, and whether MLX can be used here at all.

Imports MLX only when asked, so that the answer can be no.
"""

import contextlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ds4mlx.errors import DataError

SIZE_UNITS = ["", "K", "M", "G", "T"]
LIMIT = "DS4MLX_MEMORY"  # the environment variable with the memory to be used instead
# How MLX, CUDA and Metal say that there is no memory left.
RAN_OUT = re.compile(r"(?i)unable to allocate|out of ?memory|insufficient memory|bad_alloc")
CGROUPS = Path("/sys/fs/cgroup")
# Files of a control group with its limit, what is used of it, and its statistics: versions 2 and 1.
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
)


@dataclass(frozen=True)
class Memory:
    """Bytes of the memory that MLX computes in: all of it, and what can still be taken."""

    total: int
    available: int


class OutOfMemory(DataError):
    """The memory ran out while something was computed."""


def mlx_fault() -> str | None:
    """Why MLX cannot be imported here, and the remedy, in one sentence; None if it can."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        cause = " ".join(str(error).split())
        return f"MLX cannot be imported ({cause}); {_remedy()}"
    return None


def _remedy() -> str:
    if sys.platform == "linux":
        return (
            "on Linux MLX needs a back-end: install it with `pip install 'ds4mlx[cpu]'`, or with "
            "`pip install 'ds4mlx[cuda]'` for an NVIDIA GPU"
        )
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return "MLX needs a Mac with Apple silicon and a Python built for it (arm64)"
    return "install it with `pip install --upgrade mlx`"


def memory() -> Memory:
    """The memory of the device that MLX computes on. Needs MLX."""
    import mlx.core as mx

    if mx.default_device() != mx.gpu:
        return host_memory()
    about = mx.device_info()
    if mx.metal.is_available():
        return Memory(int(about["memory_size"]), int(about["max_recommended_working_set_size"]))
    return Memory(int(about["total_memory"]), int(about["free_memory"]))


def usable() -> int:
    """Bytes that a model and its states may take here. Needs MLX.

    On Metal what the device recommends, else all of its memory; or what $DS4MLX_MEMORY says.
    Raises DataError if that is no size.
    """
    wanted = os.environ.get(LIMIT)
    if wanted:
        try:
            return size(wanted)
        except DataError as error:
            raise DataError(f"${LIMIT}: {error}") from None
    import mlx.core as mx

    here = memory()
    on_metal = mx.metal.is_available() and mx.default_device() == mx.gpu
    return here.available if on_metal else here.total


def size(text: str) -> int:
    """Bytes of a size such as 512M or 1.5G, by 1024, as KiB are; KB, MB, GB and TB go by 1000.

    Raises DataError if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    by = 1000 if match and (match[3] or "").upper() == "B" else 1024
    number = int(float(match[1]) * by ** SIZE_UNITS.index(match[2].upper())) if match else 0
    if number < 1:
        raise DataError(f"{text!r} is not a size such as 512M or 8G")
    return number


@contextlib.contextmanager
def memory_told(what: str) -> Iterator[None]:
    """Raises OutOfMemory, a sentence that begins with `what`, where the memory runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not RAN_OUT.search(text):
            raise
        raise OutOfMemory(f"{what}: the memory ran out{text and f' ({text})'}") from error


def check_fits(what: str, needed: int) -> None:
    """Raises DataError if `what` needs more bytes than can still be taken here. Needs MLX."""
    here = memory()
    if needed > here.available:
        raise DataError(
            f"{what} needs {needed / 1e9:.1f} GB of memory; this machine has "
            f"{here.total / 1e9:.1f} GB, of which {here.available / 1e9:.1f} GB can be used now"
        )


def host_memory() -> Memory:
    """The memory that a process may use: the machine's, or less where a container limits it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _meminfo().get("MemAvailable", total)
    for limit, used in _cgroup_limits():
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return Memory(total, available)


def _meminfo() -> dict[str, int]:
    """Linux's own figures, in bytes; nothing elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _cgroup_limits() -> list[tuple[int, int]]:
    try:
        return limits(CGROUPS, Path("/proc/self/cgroup").read_text().splitlines())
    except OSError:
        return []


def limits(mount: Path, groups: list[str]) -> list[tuple[int, int]]:
    """(limit, bytes used that cannot be dropped) of each control group that has a limit.

    mount: where the groups are to be seen; groups: the lines of /proc/self/cgroup. A container may
    see its own group, or only the top, instead of the path that its line names.
    """
    pairs = []
    for line in groups:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        top = mount / kinds
        inside = top / path.lstrip("/")
        for directory in (inside, *inside.parents):
            pairs += _limit_of(directory)
            if directory == top:
                break
    return pairs


def _limit_of(directory: Path) -> list[tuple[int, int]]:
    for limit, used, statistics in CGROUP_FILES:
        try:
            most = (directory / limit).read_text().strip()
            now = int((directory / used).read_text())
            lines = (directory / statistics).read_text().splitlines()
        except (OSError, ValueError):
            continue
        if most.isdigit():
            counts = dict(line.split() for line in lines)
            cached = counts.get("total_inactive_file", counts.get("inactive_file", "0"))
            return [(int(most), now - int(cached))]
    return []
