"""Compiles, many at a time, the kernels that a script launches on an NVIDIA GPU, where MLX looks for them.

    MLX_PTX_CACHE_DIR=DIR python benchmarks/prebuild.py SCRIPT [ARGUMENTS]

MLX compiles our kernels anew in every process, one after the other: a minute for one token of Flash. It
looks into the directory first, though it keeps only its own kernels there. The script runs with its
launches noted instead of made, as far as it comes; what it prints means nothing. A later process with
the same directory and `$XDG_CACHE_HOME` begins at once. Needs NVIDIA's Python packages beside MLX, and no
GPU: but for `--arch` it compiles for a Hopper one.
"""

import argparse
import ctypes
import os
import runpy
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx

from ds4mlx.custom_kernels import dialect
from ds4mlx.custom_kernels.recorder import Recorder

# What the parameters of MLX's own header are, of which nothing else is used.
UTILS = """#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""
TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "bool": "bool"}
# As they appear in the names of kernels.
IN_NAMES = {"float32": "float", "bool": "bool"}


def main() -> None:
    """Note the script's launches, and compile them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    cache, noted = Path(os.environ["MLX_PTX_CACHE_DIR"]), Noted()
    sys.argv = [str(asked.script), *asked.arguments]
    sys.path.insert(0, str(asked.script.parent))
    mx.disable_compile()
    with dialect.launching(noted):
        try:
            runpy.run_path(str(asked.script), run_name="__main__")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - what it does otherwise is its own
            print(f"the script ended: {error!r:.200}", file=sys.stderr)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor() as pool:
        header = Path(folder) / "mlx" / "backend" / "cuda" / "device" / "utils.cuh"
        header.parent.mkdir(parents=True)
        header.write_text(UTILS)
        jobs = [
            pool.submit(compiled, cache, folder, asked.arch, name, source)
            for source, name in noted.sources.items()
        ]
        failed = [text for text in (job.result() for job in jobs) if text]
    seconds = time.perf_counter() - begun
    print(f"{len(jobs)} kernels in {seconds:.1f} s, {len(failed)} failed", *failed, sep="\n")


class Noted(Recorder):
    """Notes the source of every launch, as MLX writes it, and the kernel's name."""

    def __init__(self):
        super().__init__("cuda", [])
        self.sources: dict[str, str] = {}

    def launch(self, kernel, inputs, outputs, groups, threads, template, reads):
        """Note a launch; its outputs are zeros."""
        name, text = source(kernel, inputs, [dtype for _, dtype in outputs], template)
        self.sources[text] = name
        return super().launch(kernel, inputs, outputs, groups, threads, template, None)


def source(kernel, inputs, outputs, template) -> tuple[str, str]:
    """Name and source of a kernel with arguments of these types."""
    header, body = kernel.handed("cuda")
    name = "custom_kernel_" + kernel.name + "".join(f"_{in_name(v)}" for _, v in template)
    parameters = []
    for label, array in zip(kernel.inputs, inputs, strict=True):
        parameters.append(f"    const {in_source(array.dtype)}* {label}")
        for kind, suffix in (("Shape", "shape"), ("Strides", "strides"), ("int", "ndim")):
            if array.ndim and f"{label}_{suffix}" in body:
                parameters.append(f"    const __grid_constant__ {kind} {label}_{suffix}")
    for label, dtype in zip(kernel.outputs, outputs, strict=True):
        parameters.append(f"    {in_source(dtype)}* {label}")
    constants = "".join(constant(label, value) for label, value in template)
    text = (
        '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
        f"{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {name}(\n" + ",\n".join(parameters) + ") {\n"
    )
    text += constants + ("\n" if template else "")
    return name, f"{text}{body}\n}}\n\n}} // namespace mlx::core::cu\n"


def constant(label: str, value) -> str:
    """A template argument as a line."""
    if isinstance(value, mx.Dtype):
        return f"  using {label} = {in_source(value)};\n"
    kind, shown = ("bool", str(value).lower()) if isinstance(value, bool) else ("int", value)
    return f"  constexpr {kind} {label} = {shown};\n"


def in_source(dtype: mx.Dtype) -> str:
    """A type as CUDA names it."""
    plain = str(dtype).rpartition(".")[2].rstrip("_")
    return TYPES.get(plain, f"{plain}_t")


def in_name(value) -> str:
    """A template argument in the name of a kernel."""
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, mx.Dtype):
        plain = str(value).rpartition(".")[2].rstrip("_")
        return IN_NAMES.get(plain, f"{plain}_t")
    return str(value)


def compiled(cache: Path, headers: str, arch: str, name: str, text: str) -> str:
    """Compile a kernel to where MLX looks for it; what went wrong, or nothing."""
    place = cache / f"{name}_{hashed(text.encode()):x}"
    if place.with_name(place.name + ".txt").exists():
        return ""
    full = f"mlx::core::cu::{name}"
    try:
        code, mangled = nvrtc(text, full, headers, arch)
    except RuntimeError as error:
        return f"{name}: {error}"
    cache.mkdir(parents=True, exist_ok=True)
    place.with_name(place.name + ".ptx").write_bytes(code)
    place.with_name(place.name + ".txt").write_text(f"{full}\t{mangled}\n")
    return ""


def nvrtc(text: str, name: str, headers: str, arch: str) -> tuple[bytes, str]:
    """Machine code of a source, and its kernel's mangled name. Raises RuntimeError with the log."""
    root, mlx = nvidia(), Path(str(find_spec("mlx.core").origin)).parent  # type: ignore[union-attr]
    for built_in in (root / "lib").glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(built_in), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(next((root / "lib").glob("libnvrtc.so*"))))
    program, size, lowered = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_char_p()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    library.nvrtcAddNameExpression(program, name.encode())
    options = ["--device-as-default-execution-space", f"--gpu-architecture={arch}"]
    options += [f"-I{path}" for path in (headers, mlx / "include" / "cccl", root / "include")]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if library.nvrtcCompileProgram(program, len(options), given):
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode()[:1000])
    library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered))
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, code)
    return code.raw, (lowered.value or b"").decode()


def nvidia() -> Path:
    """The folder of NVIDIA's libraries and headers."""
    spec = find_spec("nvidia")
    roots = (
        [Path(path) / "cu13" for path in (spec.submodule_search_locations or [])] if spec else []
    )
    for root in roots:
        if (root / "lib").is_dir():
            return root
    sys.exit("NVIDIA's Python packages for CUDA 13 are not installed")


def hashed(data: bytes) -> int:
    """std::hash of a string as GNU's C++ library has it, which is MurmurHash64A with a seed of its own."""
    most, factor = (1 << 64) - 1, 0xC6A4A7935BD1E995
    value = (0xC70F6907 ^ (len(data) * factor)) & most
    whole = len(data) & ~7
    for begin in range(0, whole, 8):
        part = int.from_bytes(data[begin : begin + 8], "little") * factor & most
        value = (value ^ ((part ^ (part >> 47)) * factor & most)) * factor & most
    if whole < len(data):
        value = (value ^ int.from_bytes(data[whole:], "little")) * factor & most
    value = (value ^ (value >> 47)) * factor & most
    return value ^ (value >> 47)


if __name__ == "__main__":
    main()
