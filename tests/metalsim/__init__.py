"""Run `mx.fast.metal_kernel` kernels on a CPU, without a GPU or a Mac.

MLX itself makes the kernel text (recorded through `mx.export_function`, which works without
Metal); clang compiles it against a stand-in for Apple's <metal_stdlib>, and runtime.cpp runs it
lane by lane. What it cannot show: speed, registers, the last bits of Apple's arithmetic, and what
only Apple's compiler refuses.
"""

from metalsim.build import MetalError
from metalsim.execute import Options, run
from metalsim.kernel import metal_kernel, options_of
from metalsim.lint import check
from metalsim.text import Launch, record

__all__ = [
    "Launch",
    "MetalError",
    "Options",
    "check",
    "metal_kernel",
    "options_of",
    "record",
    "run",
]
