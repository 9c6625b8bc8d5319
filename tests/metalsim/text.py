"""The kernel text that MLX makes, and the few rewrites that turn it into C++.

Lines stay where they are, so that findings name lines of the kernel.
"""

import re
from dataclasses import dataclass

import mlx.core as mx


@dataclass
class Launch:
    """What MLX would hand to Metal for one call."""

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shape_infos: list[tuple[bool, bool, bool]]
    ensure_row_contiguous: bool
    init_value: float | None


def record(kernel, inputs, **call) -> Launch:
    """The kernel text and launch that MLX makes of a call of a metal_kernel, without a GPU."""
    found = []

    def keep(node):
        if node.get("name") == "CustomKernel":
            found.append(node["arguments"])

    with mx.stream(mx.cpu):
        mx.export_function(keep, lambda *xs: kernel(inputs=list(xs), **call), *inputs)
    name, source, gx, gy, gz, tx, ty, tz, infos, contiguous = found[0][:10]
    init = call.get("init_value")
    return Launch(name, source, (gx, gy, gz), (tx, ty, tz), infos, contiguous, init)


_VECTOR = r"(?:u?char|u?short|u?int|u?long|half|float|bfloat)[234]"
_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', re.DOTALL)
_FLOAT = re.compile(r"(?<![\w.])((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])")
_SHARED = re.compile(
    r"(?<=[;{}])\s*((?:alignas\([^()]*\)\s*)?threadgroup\b[^;=*&\[]*(?:\[[^;]*)?;)"
)
_ARRAY = re.compile(r"\bthreadgroup\b[^;=*&(){}]*\[[^;]*;")
_MAKE = re.compile(r"(?<![\w:])(?:metal::)?vec<([^<>;(){}]+)>\s*(?=\()")
_CAST = re.compile(rf"(?<![\w\)\]>])\(\s*({_VECTOR})\s*\)\s*(?=[\w(*&])")
_STATIC_CAST = re.compile(rf"\bstatic_cast<\s*({_VECTOR})\s*>\s*(?=\()")
_ATTRIBUTE = re.compile(r"\[\[[^\[\]]*\]\]")
INSTANCE = re.compile(
    r"template \[\[host_name\(\"(\w+)\"\)\]\] \[\[kernel\]\] decltype\((.*)\) \2;"
)


def to_cpp(text: str) -> str:
    """The few things of the Metal language that clang's C++ lacks.

    Raises ValueError at a threadgroup array that begins no statement: each lane would have its own.
    """
    code = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    shared = list(_SHARED.finditer(code))
    for array in _ARRAY.finditer(code):
        if not any(m.start(1) <= array.start() < m.end(1) for m in shared):
            raise ValueError(f"{array[0]!r} must follow a semicolon or a brace")
    edits = [(m.end(1), m.end(1), "f") for m in _FLOAT.finditer(code)]
    edits += [(m.start(1), m.start(1), "MSL_TG ") for m in shared]
    edits += [(m.start(), m.end(), f"metal::_make<{m[1]}>") for m in _MAKE.finditer(code)]
    edits += [(m.start(), m.end(), f"metal::_cast<{m[1]}>()->*") for m in _CAST.finditer(code)]
    edits += [(m.start(), m.end(), m[1]) for m in _STATIC_CAST.finditer(code)]
    edits += [(m.start(), m.end(), "") for m in _ATTRIBUTE.finditer(code)]
    out, at = [], 0
    for start, end, new in sorted(edits):
        if start >= at:
            out += [text[at:start], new]
            at = end
    return "".join(out) + text[at:]


_UINT3 = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "threads_per_grid",
    "threadgroups_per_grid",
)
# Where the entry function finds each attribute in a Lane of lanes.h.
_ATTRIBUTES = {
    a: f"uint3(L[{3 * i}], L[{3 * i + 1}], L[{3 * i + 2}])" for i, a in enumerate(_UINT3)
} | {
    "thread_index_in_threadgroup": "L[21]",
    "thread_index_in_simdgroup": "L[22]",
    "simdgroup_index_in_threadgroup": "L[23]",
    "simdgroups_per_threadgroup": "L[24]",
    "thread_execution_width": "32u",
    "threads_per_simdgroup": "32u",
}


def parameters(source: str, name: str) -> list[tuple[str, str, str, str]]:
    """(type, name, attribute, index) of each parameter of the kernel."""
    head = re.search(r"\[\[kernel\]\] void " + name + r"\(\n(.*?)\) \{\n", source, re.DOTALL)
    one = re.compile(r"\s*(.*?)\s*(\w+) \[\[(\w+)(?:\((\d+)\))?\]\]")
    return [one.match(p).groups() for p in head[1].split(",\n")]


def translation_unit(launch: Launch) -> str:
    """C++ with one entry point, called by every lane."""
    instance = INSTANCE.search(launch.source)
    call = instance[2] if instance else launch.name
    arguments = []
    for ctype, _, attribute, index in parameters(launch.source, launch.name):
        if attribute == "buffer":
            pointer = ctype.replace("&", "*")
            arguments.append(f"{'*' if '&' in ctype else ''}({pointer})b[{index}]")
        else:
            arguments.append(_ATTRIBUTES[attribute])
    return f"""#define MSL_TG static __attribute__((section("msl_tg")))
#include "mlx/backend/metal/kernels/utils.h"
#line 1 "{launch.name}.metal"
{to_cpp(INSTANCE.sub("", launch.source))}
#line 1 "entry"
extern "C" __attribute__((no_sanitize("thread", "undefined")))
void msl_entry(void** b, const uint* L) {{ {call}({", ".join(arguments)}); }}
extern "C" char __start_msl_tg[] __attribute__((weak)), __stop_msl_tg[] __attribute__((weak));
extern "C" char* msl_tg_lo() {{ return __start_msl_tg; }}
extern "C" char* msl_tg_hi() {{ return __stop_msl_tg; }}
"""
