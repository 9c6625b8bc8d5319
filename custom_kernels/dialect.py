"""The dialect kernels are written in, and how a kernel is launched on Metal or CUDA.

A body is Metal's language without its vector arithmetic: scalars, 16-byte vector loads, half2 through
the few functions named below, one-dimensional threadgroups of whole SIMD-groups. METAL and CUDA give
each target those functions; CUDA also gives Metal's words.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any, Literal, Protocol

import mlx.core as mx

from ds4mlx.custom_kernels.text_files import included

Target = Literal["metal", "cuda"]
Output = tuple[tuple[int, ...], mx.Dtype]
# The shares of inputs, by name, that a launch reads where it does not read the whole of them.
Shares = Callable[[], Mapping[str, float]]

# BANKS: so many copies of a table of 16-byte words, side by side and each read by the lanes of one number
# modulo BANKS, spare lanes that read different words the wait for each other.
METAL = """
#define BANKS 1
inline half2 as_half2(uint w) { return as_type<half2>(w); }
inline uint as_uint(half2 v) { return as_type<uint>(v); }
inline half2 fill2(float v) { return half2(half(v)); }
inline half2 pair2(float a, float b) { return half2(half(a), half(b)); }
inline half2 mad2(half2 a, half2 b, half2 c) { return fma(a, b, c); }
inline uint two_bf16(float a, float b) {
  return uint(as_type<ushort>(static_cast<bfloat16_t>(a))) |
         uint(as_type<ushort>(static_cast<bfloat16_t>(b))) << 16;
}
inline float low(half2 v) { return float(v.x); }
inline float high(half2 v) { return float(v.y); }
inline int dot4(uint a, uint b, int c) {
  char4 x = as_type<char4>(a), y = as_type<char4>(b);
  return c + int(x.x) * int(y.x) + int(x.y) * int(y.y) + int(x.z) * int(y.z) + int(x.w) * int(y.w);
}
"""

CUDA = """
#define BANKS 8
#define device
#define constant
#define thread
#define threadgroup
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define thread_index_in_threadgroup threadIdx.x
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define threadgroup_barrier(flags) __syncthreads()
#define simdgroup_barrier(flags) __syncwarp()
#define INFINITY __int_as_float(0x7f800000)
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;
template <typename T, typename U> inline T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "another size");
  T t;
  memcpy(&t, &u, sizeof(T));
  return t;
}
template <typename T> inline T simd_sum(T v) {
  for (int i = 1; i < 32; i *= 2) v += __shfl_xor_sync(~0u, v, i);
  return v;
}
template <typename T> inline T simd_max(T v) {
  for (int i = 1; i < 32; i *= 2) v = max(v, __shfl_xor_sync(~0u, v, i));
  return v;
}
template <typename T> inline T simd_min(T v) {
  for (int i = 1; i < 32; i *= 2) v = min(v, __shfl_xor_sync(~0u, v, i));
  return v;
}
#if __CUDA_ARCH__ >= 800
inline uint simd_max(uint v) { return __reduce_max_sync(~0u, v); }
inline uint simd_min(uint v) { return __reduce_min_sync(~0u, v); }
#endif
template <typename T> inline T simd_shuffle(T v, ushort i) { return __shfl_sync(~0u, v, i); }
template <typename T> inline T simd_shuffle_xor(T v, ushort i) {
  return __shfl_xor_sync(~0u, v, i);
}
inline half2 as_half2(uint w) { return as_type<half2>(w); }
inline uint as_uint(half2 v) { return as_type<uint>(v); }
inline half2 fill2(float v) { return __float2half2_rn(v); }
inline half2 pair2(float a, float b) { return __floats2half2_rn(a, b); }
inline half2 mad2(half2 a, half2 b, half2 c) { return __hfma2(a, b, c); }
inline uint two_bf16(float a, float b) {
  __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return as_type<uint>(v);
}
inline float low(half2 v) { return __low2float(v); }
inline float high(half2 v) { return __high2float(v); }
inline int dot4(uint a, uint b, int c) { return __dp4a(int(a), int(b), c); }
"""

# Eight activations of any type, by 16-byte loads.
LOAD8 = """
inline void load8(const device float* p, thread float* v) {
  for (int i = 0; i < 2; i++) {
    float4 q = ((const device float4*)p)[i];
    v[4 * i] = q.x; v[4 * i + 1] = q.y; v[4 * i + 2] = q.z; v[4 * i + 3] = q.w;
  }
}
inline void two(uint w, thread float* v) {
  v[0] = as_type<float>(w << 16); v[1] = as_type<float>(w & 0xffff0000u);
}
inline void load8(const device bfloat16_t* p, thread float* v) {
  uint4 q = *(const device uint4*)p;
  two(q.x, v); two(q.y, v + 2); two(q.z, v + 4); two(q.w, v + 6);
}
inline void two_halves(uint w, thread float* v) {
  v[0] = low(as_half2(w)); v[1] = high(as_half2(w));
}
inline void load8(const device float16_t* p, thread float* v) {
  uint4 q = *(const device uint4*)p;
  two_halves(q.x, v); two_halves(q.y, v + 2); two_halves(q.z, v + 4); two_halves(q.w, v + 6);
}
"""

# Counters in threadgroup memory, which all its threads may raise at once.
METAL_COUNTERS = """
inline void clear(threadgroup atomic_uint* p) { atomic_store_explicit(p, 0u, memory_order_relaxed); }
inline void count_one(threadgroup atomic_uint* p) {
  atomic_fetch_add_explicit(p, 1u, memory_order_relaxed);
}
inline uint counted(const threadgroup atomic_uint* p) {
  return atomic_load_explicit(p, memory_order_relaxed);
}
"""
CUDA_COUNTERS = """
typedef uint atomic_uint;
inline void clear(atomic_uint* p) { *p = 0; }
inline void count_one(atomic_uint* p) { atomicAdd(p, 1u); }
inline uint counted(const atomic_uint* p) { return *p; }
"""


def parts(names: Sequence[str], read: int, of: int) -> Shares:
    """Shares for inputs that are stacks of `of` parts, of which a launch reads `read` at most."""
    return lambda: dict.fromkeys(names, min(1.0, read / of))


# Spaces beside what is no part of a word, on one side.
_SPACES = re.compile(r"(?<=\w) +(?=\W)|(?<=\W) +(?=\w)")
_BEGINNING = re.compile(r"\n(?=[#a-z])")
# What a definition defines: a macro, a type, a function.
_NAMES = re.compile(r"#define (\w+)|(?:typedef|struct) .*?(\w+)\s*(?:;|$)|(\w+)\(")
_WORD = re.compile(r"\w+")
# What MLX looks for in a body, to hand it over beside the array.
_SHAPES = re.compile(r"\w+_(?:shape|strides|ndim)\b")
_SHARED = re.compile(r"^(\s*)threadgroup (?=[^*&]*\[[^;]*;)", re.MULTILINE)
_SHARED_SIZED = re.compile(r"^(\s*)threadgroup ([^*&\[]*)\[[^;]*;", re.MULTILINE)


class Launcher(Protocol):
    """What launches kernels in MLX's place: it notes them, or runs them in another way."""

    target: Target  # for which they are made

    def launch(
        self,
        kernel: "Kernel",
        inputs: list[mx.array],
        outputs: Sequence[Output],
        groups: tuple[int, int, int],
        threads: int,
        template: list[tuple[str, Any]],
        reads: Shares | None,
    ) -> list[mx.array]:
        """The outputs of a launch; see `Kernel.__call__`."""
        ...


_launcher: ContextVar[Launcher | None] = ContextVar("launcher", default=None)


@contextlib.contextmanager
def launching(launcher: Launcher | None) -> Iterator[None]:
    """Inside the block every kernel is launched by `launcher`, on a machine of any kind; None: by MLX."""
    before = _launcher.set(launcher)
    try:
        yield
    finally:
        _launcher.reset(before)


def launcher() -> Launcher | None:
    """What launches kernels in MLX's place here, if anything does."""
    return _launcher.get()


def target() -> Target | None:
    """What kernels are made for here: "metal", "cuda", or None for a CPU."""
    other = _launcher.get()
    if other is not None:
        return other.target
    if mx.default_device() != mx.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def compact(text: str) -> str:
    """A text without comments, empty lines and spaces that say nothing: MLX goes through it at every call."""
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    return "\n".join(_squeezed(line) for line in lines if line) + "\n"


def _squeezed(line: str) -> str:
    return line if line.startswith("#") or '"' in line else _SPACES.sub("", line)


def without_unused(library: str, text: str) -> str:
    """Those definitions of a library that a text, or a definition that stays, names.

    A definition begins where a line does that is not indented; what defines no name stays.
    """
    parts: list[str] = []
    for part in _BEGINNING.split(library.strip()):
        if parts and parts[-1].startswith("template") and not _defined(parts[-1]):
            parts[-1] += "\n" + part
        else:
            parts.append(part)
    names = [_defined(part) for part in parts]
    kept = [not own for own in names]
    words = set(_WORD.findall(text))
    while new := [i for i, own in enumerate(names) if not kept[i] and own & words]:
        for i in new:
            kept[i] = True
            words |= set(_WORD.findall(parts[i]))
    return "\n".join(part for part, stays in zip(parts, kept, strict=True) if stays) + "\n"


def _defined(part: str) -> set[str]:
    found = _NAMES.findall(part.partition("{")[0])
    return {name for names in found for name in names if name}


def cuda_text(text: str, dynamic: bool = False) -> str:
    """A body or header as CUDA takes it: arrays of the threadgroup are declared as shared.

    dynamic: how large they are is said where the kernel is made, and the text has one at most.
    """
    if dynamic:
        return _SHARED_SIZED.sub(r"\1extern __shared__ \2[];", text)
    return _SHARED.sub(r"\1__shared__ ", text)


class Kernel:
    """A kernel by name; made for the target when it is first called there.

    `metal` and `cuda` are header texts for one target only, put before the common `header`. `shared`:
    bytes of threadgroup memory, all in one array, where that is more than CUDA lets a text declare.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        body: str,
        header: str = "",
        *,
        metal: str = "",
        cuda: str = "",
        shared: int = 0,
    ):
        self.name, self.inputs, self.outputs, self.body = name, list(inputs), list(outputs), body
        self.shared = shared
        self.header, self.only = header, {"metal": metal, "cuda": cuda}

    def text(self, where: str) -> tuple[str, str]:
        """(header, body) for "metal" or "cuda"."""
        if where == "metal":
            return METAL + self.only["metal"] + self.header, self.body
        header = CUDA + self.only["cuda"] + self.header
        return cuda_text(header), cuda_text(self.body, self.shared > 0)

    @cached_property
    def _made(self) -> dict[str, Callable[..., list[mx.array]]]:
        return {}

    def handed(self, where: str) -> tuple[str, str]:
        """(header, body) as they are handed to MLX."""
        header, body = self.text(where)
        body, header = compact(body), compact(without_unused(header, body))
        if where == "cuda":
            asked = "".join(f"// {name}\n" for name in sorted(set(_SHAPES.findall(body))))
            header, body = included(header), asked + included(body)
        return header, body

    def make(self, where: str) -> Callable[..., list[mx.array]]:
        """MLX's kernel object for a target."""
        made = self._made.get(where)
        if made is None:
            header, body = self.handed(where)
            maker: Any = mx.fast.metal_kernel if where == "metal" else mx.fast.cuda_kernel
            more = {"shared_memory": self.shared} if where == "cuda" else {}
            made = maker(self.name, self.inputs, self.outputs, body, header=header, **more)
            self._made[where] = made
        return made

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[Output],
        *,
        groups: tuple[int, int, int],
        threads: int,
        template: Sequence[tuple[str, Any]],
        reads: Shares | None = None,
    ) -> list[mx.array]:
        """Launch `groups` threadgroups of `threads` threads; outputs are (shape, type).

        reads: asked only by a launcher that notes bytes, outside any trace, so that it may look at
        values.
        """
        launcher = _launcher.get()
        if launcher is not None:
            sizes = groups, threads, list(template)
            return launcher.launch(self, list(inputs), outputs, *sizes, reads)
        where = target()
        assert where is not None, "kernels need a GPU"
        return self.make(where)(
            inputs=list(inputs),
            template=list(template),
            grid=(groups[0] * threads, *groups[1:]),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
