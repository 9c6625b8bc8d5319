"""A drop-in for `mx.fast.metal_kernel` that runs the kernel on this CPU."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from metalsim.execute import Options, run
from metalsim.text import record

_options = Options(
    checked=bool(int(os.environ.get("METALSIM_CHECKED", "0"))),
    order=int(os.environ.get("METALSIM_ORDER", "0")),
)
REAL = mx.fast.metal_kernel


def metal_kernel(name, input_names, output_names, source, header="", **extra):
    """As `mx.fast.metal_kernel`; the result is called the same way."""
    real = REAL(name, input_names, output_names, source, header=header, **extra)

    def call(*, inputs, output_shapes, output_dtypes, stream=None, **launch):
        inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        mx.eval(inputs)
        recorded = record(
            real, inputs, output_shapes=output_shapes, output_dtypes=output_dtypes, **launch
        )
        sides = inputs, input_names, output_names, output_shapes, output_dtypes
        return run(recorded, *sides, _options)

    return call


@contextlib.contextmanager
def options_of(**changes) -> Iterator[None]:
    """Run kernels with other Options inside the block."""
    global _options
    saved, _options = _options, replace(_options, **changes)
    try:
        yield
    finally:
        _options = saved
