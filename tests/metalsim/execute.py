"""Runs a recorded launch on this CPU and collects what went wrong."""

import ctypes
import re
import subprocess
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metalsim.build import MetalError, library, runtime
from metalsim.text import Launch, translation_unit

GAP = 4096  # bytes around each buffer that must stay as they are
THREADGROUP_BYTES = 32768
BUFFERS = 31  # arguments of a kernel, shapes among them
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
_NUMPY = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class Options:
    """How to run: `checked` finds races and stray accesses, two to ten times slower."""

    checked: bool = False
    order: int = 0  # of the lanes: 0 forward, 1 backward, more: shuffled with this seed
    strict_divergence: bool = False
    timeout: int = 60


class _Launch(ctypes.Structure):
    """struct Launch of runtime.cpp."""

    _fields_ = [
        ("fn", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("sizes", ctypes.c_void_p),
        ("kinds", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("threadgroup", ctypes.c_uint * 3),
        ("order", ctypes.c_int),
        ("checked", ctypes.c_int),
        ("strict_divergence", ctypes.c_int),
        ("timeout", ctypes.c_int),
        ("image_lo", ctypes.c_void_p),
        ("image_hi", ctypes.c_void_p),
        ("tg_lo", ctypes.c_void_p),
        ("tg_hi", ctypes.c_void_p),
    ]


@dataclass
class Part:
    """A buffer of the launch: its bytes, and 0 input, 1 output, 3 output that is initialised."""

    name: str
    data: np.ndarray
    kind: int = 0


def run(launch: Launch, inputs, names, outputs, shapes, dtypes, options: Options) -> list[mx.array]:
    """The outputs of a launch. Raises MetalError if anything was found."""
    lib, so, base, end = library(translation_unit(launch), options.checked)
    _check_sizes(launch, lib)
    parts = _parts(launch, inputs, names, outputs, shapes, dtypes)
    arena, places = _arena(parts)
    before = arena.copy()
    addresses = [arena.ctypes.data + place for place in places]
    call = _call(launch, lib, parts, addresses, options, base, end)
    rc = runtime().msl_run(ctypes.byref(call[0]))
    found = _findings(so, launch)
    if not options.checked and rc >= 0 and _stray(arena, before, parts, places):
        found.append("wrote outside the outputs (run checked to see where)")
    if found:
        raise MetalError("\n".join(found))
    written = [(p, at) for p, at in zip(parts, places, strict=True) if p.kind & 1]
    return [
        _output(arena[at : at + part.data.size].copy(), shape, dtype)
        for (part, at), shape, dtype in zip(written, shapes, dtypes, strict=True)
    ]


def _check_sizes(launch: Launch, lib: ctypes.CDLL) -> None:
    threads = int(np.prod(launch.threadgroup))
    if threads > 1024:
        raise MetalError(f"threadgroup of {threads} threads: the limit is 1024")
    used = (lib.msl_tg_hi() or 0) - (lib.msl_tg_lo() or 0)
    if used > THREADGROUP_BYTES:
        raise MetalError(f"{used} bytes of threadgroup memory: the limit is {THREADGROUP_BYTES}")
    buffers = launch.source.count("[[buffer(")
    if buffers > BUFFERS:
        raise MetalError(f"{buffers} buffers: the limit is {BUFFERS}")


def _parts(launch, inputs, names, outputs, shapes, dtypes) -> list[Part]:
    """Buffers in the order of their indices."""
    parts = []
    for x, name, (shape, strides, ndim) in zip(inputs, names, launch.shape_infos, strict=True):
        data = _bytes(x)
        parts.append(Part(name, data))
        if x.ndim and shape:
            parts.append(Part(name + "_shape", np.array(x.shape, np.int32).view(np.uint8)))
        if x.ndim and strides:
            steps = np.array(np.cumprod([1, *x.shape[:0:-1]])[::-1], np.int64)
            parts.append(Part(name + "_strides", steps.view(np.uint8)))
        if x.ndim and ndim:
            parts.append(Part(name + "_ndim", np.array([x.ndim], np.int32).view(np.uint8)))
    for name, shape, dtype in zip(outputs, shapes, dtypes, strict=True):
        count = int(np.prod(shape))
        if launch.init_value is None:  # NaN, or a large number
            parts.append(Part(name, np.full(count * dtype.size, 0xFF, np.uint8), 1))
        else:
            parts.append(Part(name, _bytes(mx.full((count,), launch.init_value, dtype)), 3))
    return parts


def _bytes(x: mx.array) -> np.ndarray:
    """The memory of an array, row-contiguous as MLX binds it."""
    raw = x if x.dtype == mx.bool_ else mx.view(x, _BITS[x.dtype.size])
    return np.ascontiguousarray(np.asarray(raw)).reshape(-1).view(np.uint8)


def _output(raw: np.ndarray, shape, dtype: mx.Dtype) -> mx.array:
    bits = mx.array(raw.view(_NUMPY[dtype.size]))
    return (bits.astype(mx.bool_) if dtype == mx.bool_ else mx.view(bits, dtype)).reshape(shape)


def _arena(parts: list[Part]) -> tuple[np.ndarray, list[int]]:
    """All buffers in one allocation with gaps between, and where each begins in it."""
    sizes = [-(-part.data.size // 256) * 256 + GAP for part in parts]
    arena = np.full(sum(sizes) + GAP + 256, 0xFF, np.uint8)
    lift = -arena.ctypes.data % 256
    places = [lift + GAP + sum(sizes[:i]) for i in range(len(parts))]
    for part, place in zip(parts, places, strict=True):
        arena[place : place + part.data.size] = part.data
    return arena, places


def _stray(arena: np.ndarray, before: np.ndarray, parts: list[Part], places: list[int]) -> bool:
    """Whether bytes outside the outputs have changed."""
    kept = np.ones(arena.size, bool)
    for part, place in zip(parts, places, strict=True):
        kept[place : place + part.data.size] = part.kind == 0
    return bool((arena[kept] != before[kept]).any())


def _call(launch, lib, parts, addresses, options, base, end) -> tuple[_Launch, list]:
    """The C structure, and what it points to."""
    k = len(parts)
    arrays = [
        (ctypes.c_void_p * k)(*addresses),
        (ctypes.c_size_t * k)(*(part.data.size for part in parts)),
        (ctypes.c_int * k)(*(part.kind for part in parts)),
        (ctypes.c_char_p * k)(*(part.name.encode() for part in parts)),
    ]
    buffers, sizes, kinds, names = (ctypes.addressof(array) for array in arrays)
    call = _Launch(
        *(ctypes.cast(lib.msl_entry, ctypes.c_void_p), buffers, k, sizes, kinds, names),
        *((ctypes.c_uint * 3)(*launch.grid), (ctypes.c_uint * 3)(*launch.threadgroup)),
        *(options.order, options.checked, options.strict_divergence, options.timeout),
        *(base, end, lib.msl_tg_lo(), lib.msl_tg_hi()),
    )
    return call, arrays


def _findings(so, launch: Launch) -> list[str]:
    lines, out = launch.source.split("\n"), []
    for i in range(runtime().msl_findings()):
        line, pc, count = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_long()
        fields = (ctypes.byref(line), ctypes.byref(pc), ctypes.byref(count))
        text = runtime().msl_finding(i, *fields).decode()
        at = line.value or (_line_of(so, pc.value, launch.name) if pc.value else 0)
        quote = f"\n  {at} | {lines[at - 1].strip()}" if 0 < at <= len(lines) else ""
        times = f" ({count.value} times)" if count.value > 1 else ""
        out.append(f"{launch.name}: {text}{times}{quote}")
    return out


def _line_of(so, pc: int, name: str) -> int:
    command = ["addr2line", "-i", "-e", str(so), hex(pc)]
    said = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    hits = re.findall(re.escape(name) + r"\.metal:(\d+)", said)
    return int(hits[0]) if hits else 0
