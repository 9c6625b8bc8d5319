"""Down of the experts, and at once the streams that come of them with their mixes: one launch.

A threadgroup makes the same channels of the routed experts' sum and of the shared expert's values, one
after the other, as `routed_down` does. Then it merges them into the streams, and multiplies their part
of the next matrix `fn`, for which its threads asked before.
"""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.dialect import Kernel, parts
from ds4mlx.custom_kernels.layer import hyper_after_text as text
from ds4mlx.custom_kernels.layer import hyper_out
from ds4mlx.custom_kernels.layer.after import After, Beside
from ds4mlx.custom_kernels.layer.carried import Carried, Together, carry, size
from ds4mlx.custom_kernels.products import experts_down, routed_down
from ds4mlx.custom_kernels.products.experts_down import GROUPS
from ds4mlx.custom_kernels.products.routed import Routed
from ds4mlx.custom_kernels.products.routed_down import Shared
from ds4mlx.formats import FORMATS, Planes

# Both jobs give a threadgroup as many channels as the merge takes.
assert experts_down.ROWS * GROUPS == routed_down.ROWS * GROUPS == hyper_out.SLICE

_PUT = """
#define PUT_ROUTED(row, y) given[(row) - 32 * part] = y
#define PUT_SHARED(t, row, y) common[(row) - 32 * part] = y
"""

_BODY = """
%s
    threadgroup float given[32], common[32];
    uint part = threadgroup_position_in_grid.x, token = 0, tokens = 1;
    %s
%s
    {
%s
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    {
        DENSE w;
        %s
%s
    }
%s
"""


# The weights lie behind the shared expert's products.
_AFTER = "    const device float* after = products;\n"


class Streams(NamedTuple):
    """Streams before a sublayer, and what they and their mixes are made of after it.

    after: the weights for what it gives; fn float32 (rows, n D): as `hyper_out` has it.
    """

    before: Carried
    after: After | Beside
    fn: mx.array


@lru_cache
def kernel(format: str, dtype: mx.Dtype, eight: bool, dense_format: str) -> Kernel:
    """The kernel for routed experts in a format, hidden values of a type, and a shared expert."""
    planes = {plane: f"dense_{plane}" for plane in FORMATS[dense_format].layout}
    taken = " ".join(f"w.{plane} = {name};" for plane, name in planes.items())
    jobs = experts_down.PRODUCTS, taken, routed_down.SHARED
    merge = text.merge("given[lane] + float(static_cast<T>(common[lane]))")
    begin = routed_down.EXPERTS, _AFTER + text.BEGIN
    body = _BODY % (experts_down.DECLARED, *begin, *jobs, merge)
    header = routed_down.shared_header(format, dtype, eight, dense_format, _PUT)
    inputs = ["carried", "fn", "hidden", "products"]
    inputs += [*PACKINGS[format].names("down"), *planes.values()]
    name = _name(format, dtype, eight, dense_format)
    return Kernel(name, inputs, ["made"], body, header)


def _name(format: str, dtype: mx.Dtype, eight: bool, dense_format: str) -> str:
    return f"routed_hyper_{format}_{staging.arithmetic(dtype, eight)}_{dense_format}"


def routed_hyper(
    format: str,
    down: Planes,
    values: Routed,
    shared: Shared,
    streams: Streams,
    *,
    eight: bool = False,
) -> Carried:
    """`hyper_out` of what `routed_down` gives: new streams, and their partial mixes.

    Of one token, whose weights lie beside the shared expert's products, a launch makes both; else there
    is a launch for each.
    """
    way = by_kernel if takes(format, values, shared, streams, eight) else apart
    return way(format, down, values, shared, streams, eight=eight)


def takes(
    format: str,
    values: Routed,
    shared: Shared,
    streams: Streams,
    eight: bool = False,
) -> bool:
    """Whether the kernel multiplies hidden values and merges what that gives into streams."""
    suits = isinstance(streams.before, Together) and values.tokens == 1
    suits = suits and len(streams.fn) <= hyper_out.MOST_ROWS and _beside(streams.after, shared)
    suits = suits and streams.before.dtype == values.dtype
    if not suits or not routed_down.suits(format, values, shared):
        return False
    # How a shared format is read is compared as `dense_matvec`, which has the same text.
    name = _name(format, values.dtype, eight, shared.format).removesuffix(f"_{shared.format}")
    return dispatch.active(values.array, name)


def _beside(after: After | Beside, shared: Shared) -> bool:
    return isinstance(after, Beside) and after.array is shared.gates.array


def plain(
    format: str,
    down: Planes,
    values: Routed,
    shared: Shared,
    streams: Streams,
    *,
    eight: bool = False,
) -> Carried:
    """`routed_hyper` by MLX's own operations, which know no bytes."""
    with dispatch.plain_operations():
        return apart(format, down, values, shared, streams, eight=eight)


def apart(
    format: str,
    down: Planes,
    values: Routed,
    shared: Shared,
    streams: Streams,
    *,
    eight: bool = False,
) -> Carried:
    """`routed_hyper` as two operations, each by a kernel or not."""
    sides = {"dtype": streams.before.dtype, "eight": eight}
    outs = routed_down.routed_down(format, down, values, shared, **sides)
    before, after, fn = streams
    return carry(*hyper_out.hyper_out(before.streams, outs, after.post, after.comb, fn))


def by_kernel(
    format: str,
    down: Planes,
    values: Routed,
    shared: Shared,
    streams: Streams,
    *,
    eight: bool = False,
) -> Carried:
    """`routed_hyper` in one launch; see `takes`."""
    before = streams.before
    assert isinstance(before, Together) and isinstance(streams.after, Beside)
    width, rows = before.width, len(streams.fn)
    slices = -(-width // hyper_out.SLICE)
    (made,) = kernel(format, values.dtype, eight, shared.format)(
        [
            *(before.array, streams.fn, values.array, shared.gates.array),
            *routed_down.planes_of(format, down, shared),
        ],
        [((1, size(width, slices, rows + 1, before.dtype)), before.dtype)],
        groups=(slices, 1, 1),
        threads=32 * GROUPS,
        template=[
            *routed_down.template(values, shared, width),
            *text.template(rows, GROUPS, streams.after.begin),
        ],
        reads=parts(PACKINGS[format].names("down"), values.topk, len(down["weight"])),
    )
    return Together(made, width, rows + 1)
