"""The routed experts with the router's choice inside, and with the shared expert beside them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels.cases.base import Case, Pairs, normal
from ds4mlx.custom_kernels.cases.hyper import fn_of, mixed, partials
from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.layer.after import After, Beside, beside
from ds4mlx.custom_kernels.layer.carried import together
from ds4mlx.custom_kernels.layer.hyper_post import plain as spread
from ds4mlx.custom_kernels.layer.hyper_pre import MIXES, STREAMS
from ds4mlx.custom_kernels.products import routed_down, routed_hyper, routed_up
from ds4mlx.custom_kernels.products.columns import Columns, Inside, whole
from ds4mlx.custom_kernels.products.experts import DOWN, UP
from ds4mlx.custom_kernels.products.routed import Routed, routed
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.formats import FORMATS, Planes

F32, BF16 = mx.float32, mx.bfloat16
LIMIT = 0.7  # low, so that many values are clamped


def up(
    format: str,
    dtype: mx.Dtype,
    experts: int,
    hidden: int,
    width: int,
    tokens: int,
    topk: int,
    hashed: bool = False,
    eight: bool = False,
    inside: bool = False,
) -> Pairs:
    """Hidden values, and the experts that they are of. inside: x lies in a row of float32."""
    gate, rise = (random_planes(format, (experts, hidden, width), seed) for seed in (1, 2))
    x = lying = normal((tokens, width), dtype, 3)
    logits = Columns(normal((tokens, experts + 7), F32, 4, 2.0), 5, experts)
    if inside:
        lying = Inside(mx.concatenate([mx.zeros((1, 8)), x.view(F32)], axis=1), 8, width, dtype)
    options: dict[str, Any] = {"bias": normal((experts,), F32, 5)}
    if hashed:
        rng = np.random.default_rng(0)
        table = np.stack([rng.permutation(experts)[:topk] for _ in range(50)]).astype(np.int32)
        options = {"table": mx.array(table), "ids": mx.arange(7, 7 + tokens)}
    options |= {"scale": 1.5, "topk": topk, "limit": LIMIT}
    got = routed_up.by_kernel(format, gate, rise, lying, logits, **options, eight=eight)
    x = staging.as_bytes(x) if eight else x.astype(F32)
    want = routed_up.plain(format, gate, rise, x, logits, **options)
    pairs = (got.hidden, want.hidden), (got.chosen, want.chosen)
    return [(a.astype(F32), b.astype(F32)) for a, b in pairs]


class Down(NamedTuple):
    """What `routed_down` is given, and what it should give in float32."""

    planes: Planes
    values: Routed
    shared: routed_down.Shared
    wanted: tuple[mx.array, mx.array]


def down_of(
    format: str,
    dtype: mx.Dtype,
    shared: str,
    sizes: tuple[int, int, int, int],
    tokens: int,
    topk: int,
    eight: bool = False,
) -> Down:
    """sizes: experts, routed and shared hidden values, width."""
    experts, hidden, inner, width = sizes
    planes = random_planes(format, (experts, width, hidden), 1)
    matrix = random_planes(shared, (width, inner), 2)
    rng = np.random.default_rng(3)
    chosen = mx.array(rng.integers(0, experts - 1, (tokens, topk)).astype(np.int32))
    values = normal((tokens * topk, hidden), dtype, 4)
    products = normal((tokens, 2 * inner + 12), F32, 5)
    both = Columns(products, 4, inner), Columns(products, inner + 8, inner)
    own = routed_down.Shared(shared, matrix, *both, LIMIT)
    exact = staging.as_bytes(values) if eight else values.astype(F32)
    whole_ones = routed(exact, chosen)
    sums, _ = routed_down.plain(format, planes, whole_ones, own, dtype=F32)
    rounded = products.astype(dtype).astype(F32)
    gates, ups = both[0]._replace(array=rounded), both[1]._replace(array=rounded)
    rest = routed_down.Shared(shared, matrix, gates, ups, LIMIT)
    _, common = routed_down.plain(format, planes, whole_ones, rest, dtype=F32)
    return Down(planes, routed(values, chosen), own, (sums, common))


def down(format: str, dtype: mx.Dtype, *more: Any, eight: bool = False) -> Pairs:
    """more: as `down_of` has it."""
    given = down_of(format, dtype, *more, eight=eight)
    sides = given.planes, given.values, given.shared
    got = routed_down.by_kernel(format, *sides, dtype=dtype, eight=eight)
    return list(zip(got, given.wanted, strict=True))


def merged(
    format: str, dtype: mx.Dtype, *more: Any, rows: int = MIXES, eight: bool = False
) -> Pairs:
    """The streams after a sublayer, and their mixes by so many rows, of one token."""
    given = down_of(format, dtype, *more, eight=eight)
    width = given.wanted[0].shape[1]
    streams, fn = normal((1, STREAMS, width), dtype, 8), fn_of(rows, width)
    weights = After(normal((1, 4), F32, 6), normal((1, 4, 4), F32, 7))
    shared, lying = with_weights(given.shared, weights)
    sides = given.planes, given.values, shared
    before = together(streams, partials(streams, fn))
    both = routed_hyper.Streams(before, lying, fn)
    new = routed_hyper.by_kernel(format, *sides, both, eight=eight)
    out = given.wanted[0] + given.wanted[1]
    want = spread(streams.astype(F32), out, *weights)
    return [(new.streams, want), *mixed(new.partial, new.streams, fn)]


def with_weights(shared: routed_down.Shared, after: After) -> tuple[routed_down.Shared, Beside]:
    """Weights for what a sublayer gives, behind the shared expert's products."""
    lying = beside(shared.gates.array, after)
    gates, ups = (each._replace(array=lying.array) for each in (shared.gates, shared.ups))
    return shared._replace(gates=gates, ups=ups), lying


def small() -> Iterator[Case]:
    """Every format, experts chosen and listed, odd numbers of rows."""
    for dtype in (F32, BF16):
        yield from _bytes(dtype)
        for number, format in enumerate(UP.formats):
            for hashed in (False, True):
                sizes = (37, 21, 256, 1 + number, 6, hashed)
                call = partial(up, format, dtype, *sizes)
                yield Case(f"routed_up {format} {sizes}", dtype, call)
                call = partial(up, format, dtype, 37, 21, 256, 1, 6, hashed, inside=True)
                yield Case(f"routed_up {format}, hashed {hashed}, inside", dtype, call)
        for format, shared, tokens in zip(
            DOWN.formats, ("mxfp8", "q8_0", "bf16"), (1, 3, 8), strict=True
        ):
            sizes = (5, 256, 320, 37)
            call = partial(down, format, dtype, shared, sizes, tokens, 3)
            yield Case(f"routed_down {format} with {shared} {sizes}, {tokens} tokens", dtype, call)
            call = partial(merged, format, dtype, shared, (*sizes[:3], 40), 1, 3)
            yield Case(f"routed_hyper {format} with {shared}", dtype, call)


def _bytes(dtype: mx.Dtype) -> Iterator[Case]:
    """Activations rounded to 8 bits, where a format has such a product."""
    for format in ("iq2_xxs", "q2_k", "q4_k"):
        for hashed in (False, True):
            call = partial(up, format, dtype, 37, 21, 256, 2, 6, hashed, eight=True)
            yield Case(f"routed_up {format}, hashed {hashed}, bytes", dtype, call)
    for format in ("q2_k", "q4_k"):
        call = partial(down, format, dtype, "mxfp8", (5, 256, 320, 37), 2, 3, eight=True)
        yield Case(f"routed_down {format}, bytes", dtype, call)
        call = partial(merged, format, dtype, "mxfp8", (5, 256, 320, 40), 1, 3, eight=True)
        yield Case(f"routed_hyper {format}, bytes", dtype, call)


def wide() -> Iterator[Case]:
    """Flash's widths, few rows."""
    for inside in (False, True):
        call = partial(up, "iq2_xxs", BF16, 256, 4, 4096, 1, 6, inside=inside)
        yield Case(f"routed_up iq2_xxs of 256 experts by 4096, inside {inside}", BF16, call)
    call = partial(down, "q2_k", BF16, "mxfp8", (8, 2048, 2048, 21), 1, 6)
    yield Case("routed_down q2_k by 2048", BF16, call)
    call = partial(merged, "q2_k", BF16, "mxfp8", (8, 2048, 2048, 24), 1, 6, rows=STREAMS)
    yield Case("routed_hyper q2_k by 2048", BF16, call)
    for tokens, shared, inner in ((8, "mxfp8", 1184), (5, "bf16", 1048), (8, "f32", 636)):
        call = partial(down, "mxfp4", BF16, shared, (5, 256, inner, 37), tokens, 2)
        yield Case(f"routed_down mxfp4 with {shared} of {inner}, {tokens} tokens", BF16, call)


Timed = tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]
FORMATS_TIMED = (("iq2_xxs", "q2_k"), ("q4_k", "q4_k"))


def timed(tokens: int = 1, formats: Sequence[tuple[str, str]] = FORMATS_TIMED) -> Iterator[Timed]:
    """At Flash's sizes: (title, call(i, x), x, bytes read); call depends on x, its experts on i."""
    count, hidden, width, topk = 256, 2048, 4096, 6
    logits = normal((32, tokens, count), F32, 4, 2.0)
    bias = normal((count,), F32, 5)
    chosen = mx.contiguous(mx.argsort(-(logits + bias), axis=-1)[..., :topk]).astype(mx.int32)
    for rising, falling in formats:
        gate, rise = (random_planes(rising, (count, hidden, width), seed) for seed in (1, 2))
        x = normal((tokens, width), BF16, 3)
        mx.eval(gate, rise, x, logits, bias)
        options: dict[str, Any] = {"bias": bias, "scale": 1.5, "topk": topk, "limit": 10.0}

        def lift(i, x, gate=gate, rise=rise, rising=rising, options=options):
            own = whole(logits[i % 32])
            return routed_up.by_kernel(rising, gate, rise, x, own, **options).array

        size = 2 * tokens * topk * FORMATS[rising].bits * hidden * width / 8
        yield f"routed_up {rising}, {tokens} tokens", lift, x, int(size)
        del gate, rise, lift
        planes = random_planes(falling, (count, width, hidden), 1)
        shared = [random_planes("mxfp8", (width, hidden), 10 + i) for i in range(12)]
        values, sums = normal((tokens * topk, hidden), BF16, 6), normal((tokens, hidden), F32, 7)
        lying = [routed(values, each) for each in chosen]
        mx.eval(planes, shared, values, sums, lying)

        def drop(i, x, planes=planes, falling=falling, shared=shared, sums=sums, lying=lying):
            own = routed_down.Shared("mxfp8", shared[i % 12], whole(sums), whole(sums), 10.0)
            array = mx.depends(lying[i % 32].array, x)
            given = lying[i % 32]._replace(array=array)
            return routed_down.by_kernel(falling, planes, given, own, dtype=BF16)[0]

        size = tokens * topk * FORMATS[falling].bits + FORMATS["mxfp8"].bits
        yield (
            f"routed_down {falling}, {tokens} tokens",
            drop,
            values,
            int(size * hidden * width / 8),
        )
        del planes, shared, drop, lying
