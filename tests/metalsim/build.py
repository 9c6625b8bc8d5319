"""clang: kernel text to shared objects, kept in a cache directory by their content."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx

HERE = Path(__file__).parent
CLANGS = ("clang-19", "clang-20", "clang-21", "clang-18", "clang")
CLANG = os.environ.get("METALSIM_CLANG") or next(filter(shutil.which, CLANGS), "clang-19")
CACHE = Path(os.environ.get("METALSIM_CACHE", Path(tempfile.gettempdir()) / "metalsim-cache"))
MLX_INCLUDE = next(p for part in mlx.__path__ if (p := Path(part) / "include").exists())
HEADERS = '#include "mlx/backend/metal/kernels/utils.h"\n'

BASE = [
    *("-x", "c++", "-std=c++17", "-fno-exceptions", "-fno-rtti", "-fno-math-errno"),
    *("-ffp-contract=off", "-Wno-everything", "-fno-color-diagnostics"),
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
    *(f"-I{HERE / 'include'}", f"-I{MLX_INCLUDE}"),
]
RUN = ["-O2", "-fPIC", "-march=native"]
CHECKED = [
    *("-O1", "-gline-tables-only", "-fPIC", "-march=native", "-fsanitize=thread,undefined"),
    *("-fno-sanitize=vptr,function,null", "-fsanitize-recover=all"),
    *("-mllvm", "-tsan-instrument-atomics=0"),
]


class MetalError(Exception):
    """A kernel that does not compile, or that misbehaves when it runs."""


def clang(args: list, stdin: str | None = None) -> str:
    """Run the compiler; its output. Raises MetalError with what it says."""
    command = [CLANG, *map(str, args)]
    try:
        done = subprocess.run(command, check=False, input=stdin, text=True, capture_output=True)
    except FileNotFoundError:
        raise MetalError(f"no {CLANG}: ./run.sh test installs it") from None
    if done.returncode:
        raise MetalError(done.stderr)
    return done.stdout


@functools.cache
def runtime() -> ctypes.CDLL:
    """runtime.cpp, loaded so that kernels find its hooks."""
    CACHE.mkdir(parents=True, exist_ok=True)
    content = b"".join(
        (HERE / f).read_bytes() for f in ("fibers.h", "lanes.h", "memory.h", "runtime.cpp")
    )
    so = CACHE / f"runtime-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not so.exists():
        tmp = so.with_suffix(f".{os.getpid()}")
        flags = ["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wall"]
        clang([*flags, HERE / "runtime.cpp", "-lstdc++", "-o", tmp])
        tmp.rename(so)
    lib = ctypes.CDLL(str(so), mode=ctypes.RTLD_GLOBAL)
    lib.msl_finding.restype = ctypes.c_char_p
    return lib


@functools.cache
def _shim_hash() -> str:
    h = hashlib.sha256(" ".join(map(str, BASE + RUN + CHECKED)).encode())
    for file in sorted((HERE / "include").rglob("*")):
        if file.is_file():
            h.update(file.read_bytes())
    return h.hexdigest()


@functools.cache
def _headers(checked: bool) -> Path:
    """Metal's headers, compiled once for all units: half the time of a small one would be theirs."""
    pch = CACHE / f"headers-{_shim_hash()[:16]}-{'checked' if checked else 'run'}.pch"
    if not pch.exists():
        tmp = pch.with_suffix(f".{os.getpid()}")
        flags = [*BASE, *(CHECKED if checked else RUN), "-Xclang", "-fno-pch-timestamp"]
        clang([*flags, "-x", "c++-header", "-", "-o", tmp], HEADERS)
        tmp.rename(pch)
    return pch


def compile_unit(unit: str, checked: bool) -> Path:
    """The shared object of a translation unit."""
    CACHE.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256((unit + _shim_hash() + str(checked)).encode()).hexdigest()[:24]
    so = CACHE / f"{key}.so"
    if not so.exists():
        tmp = so.with_suffix(f".{os.getpid()}")
        obj = tmp.with_name(f"{tmp.name}.o")  # of this process, as tmp is
        flags = [*BASE, *(CHECKED if checked else RUN), "-include-pch", _headers(checked)]
        clang([*flags, "-c", "-", "-o", obj], unit)
        # by ld, as clang would add a sanitizer runtime; runtime.cpp is it
        subprocess.run(["ld", "-shared", obj, "-o", tmp], check=True)
        obj.unlink()
        tmp.rename(so)
    return so


@functools.cache
def library(unit: str, checked: bool) -> tuple[ctypes.CDLL, Path, int, int]:
    """The loaded kernel, its file, and the addresses it lies at."""
    runtime()
    so = compile_unit(unit, checked)
    lib = ctypes.CDLL(str(so))
    lib.msl_tg_lo.restype = lib.msl_tg_hi.restype = ctypes.c_void_p
    base = end = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.rstrip().endswith(str(so)):
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            base, end = base or low, high
    return lib, so, base, end + 65536
