"""Notes of every launch, on any machine and for either target, in place of the launches themselves.

    with recording("metal") as launches:
        output = model(tokens)

What a launch returns has the right shape and type, costs no memory, and hangs in MLX's graph on what
the launch was given. So `graph.operations(output)` lists MLX's own operations around it.
"""

import contextlib
import os
from collections.abc import Iterator

import mlx.core as mx

from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.custom_kernels.recorder import Operation, Recorder


@contextlib.contextmanager
def recording(target: dialect.Target = "metal", *, every: bool = True) -> Iterator[list[Operation]]:
    """Inside the block kernels are used as for a target, and noted instead of launched.

    every: whether all are used, or, where the target is this machine's own, only those good on it.
    `mx.compile` is off inside, so that no compiled function keeps what was recorded in its trace.
    """
    recorder = Recorder(target, [])
    mx.disable_compile()
    try:
        used = dispatch.kernels() if every else contextlib.nullcontext()
        with dialect.launching(recorder), used:
            yield recorder.launches
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()
