"""The launches before and after a sublayer beside their references, and before the head."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.cases.base import Case, Pairs, normal
from ds4mlx.custom_kernels.layer import head_in, hyper_before, hyper_in, hyper_out
from ds4mlx.custom_kernels.layer.hyper_post import plain as merged
from ds4mlx.custom_kernels.layer.hyper_pre import MIXES, STREAMS, collapse, project
from ds4mlx.custom_kernels.layer.hyper_pre import plain as before_sublayer
from ds4mlx.custom_kernels.layer.plain import rms_norm

F32 = mx.float32
EPS: Any = {"eps": 1e-6, "norm_eps": 1e-6}
SLICE = 16  # channels of a partial sum, not as the kernel cuts them


def fn_of(rows: int, width: int, seed: int = 1) -> mx.array:
    return normal((rows, STREAMS * width), F32, seed, width**-0.5)


def partials(streams: mx.array, fn: mx.array) -> mx.array:
    """Partial mixes of streams (B, n, D) over slices of channels."""
    x = streams.astype(F32)
    rows = fn.reshape(-1, *x.shape[1:])
    parts = []
    for first in range(0, x.shape[2], SLICE):
        part = x[..., first : first + SLICE].flatten(1)
        products = part @ rows[..., first : first + SLICE].flatten(1).T
        parts.append(mx.concatenate([products, part.square().sum(-1, keepdims=True)], axis=-1))
    return mx.stack(parts, axis=1)


def norm_of(width: int, dtype: mx.Dtype) -> mx.array:
    return (1 + normal((width,), F32, 5, 0.3)).astype(dtype)


def before(
    dtype: mx.Dtype,
    width: int,
    tokens: int,
    scale: float = 1.0,
    steep: float = 1.0,
    iterations: int = 20,
) -> Pairs:
    """steep: of the weights between streams before Sinkhorn's iterations."""
    streams, fn = normal((tokens, STREAMS, width), dtype, 4, scale), fn_of(MIXES, width)
    weights = normal((MIXES,), F32, 2, steep), normal((3,), F32, 3)
    norm, options = norm_of(width, dtype), {"iterations": iterations, **EPS}
    got = hyper_in.by_kernel(streams, partials(streams, fn), *weights, norm, **options)
    want = before_sublayer(streams.astype(F32), fn, *weights, norm, **options)
    return list(zip(got, want, strict=True))


def many(dtype: mx.Dtype, width: int, tokens: int, scale: float = 1.0) -> Pairs:
    streams, fn = normal((tokens, STREAMS, width), dtype, 1, scale), fn_of(MIXES, width)
    return mixed(hyper_before.mixes(streams, fn), streams, fn)


def head(dtype: mx.Dtype, width: int, tokens: int, scale: float = 1.0) -> Pairs:
    streams, fn = normal((tokens, STREAMS, width), dtype, 4, scale), fn_of(STREAMS, width)
    base, by, norm = normal((STREAMS,), F32, 2), normal((1,), F32, 3), norm_of(width, dtype)
    got = head_in.by_kernel(streams, partials(streams, fn), base, by, norm, **EPS)
    pre = mx.sigmoid(project(streams, fn, EPS["norm_eps"]) * by + base) + EPS["eps"]
    return [(got, rms_norm(collapse(streams.astype(F32), pre), norm, EPS["norm_eps"]))]


def after(
    dtype: mx.Dtype, width: int, tokens: int, rows: int = MIXES, outs: int = 1, scale: float = 1.0
) -> Pairs:
    """New streams; their mixes, of the streams as the kernel rounded them."""
    streams, fn = normal((tokens, STREAMS, width), dtype, 1, scale), fn_of(rows, width)
    given = [normal((tokens, width), F32, 2 + i, scale) for i in range(outs)]
    post, comb = normal((tokens, 4), F32, 6), normal((tokens, 4, 4), F32, 7)
    new, sums = hyper_out.by_kernel(streams, given, post, comb, fn)
    want = merged(streams.astype(F32), sum(given[1:], given[0]), post, comb)
    return [(new, want), *mixed(sums, new, fn)]


def mix(dtype: mx.Dtype, width: int, tokens: int, rows: int = MIXES) -> Pairs:
    streams, fn = normal((tokens, STREAMS, width), dtype, 1), fn_of(rows, width)
    return mixed(hyper_out.mix_by_kernel(streams, fn), streams, fn)


def mixed(sums: mx.array, streams: mx.array, fn: mx.array) -> Pairs:
    want = partials(streams, fn).sum(axis=1)
    got = sums.sum(axis=1)
    return [(got[:, :-1], want[:, :-1]), (got[:, -1], want[:, -1])]


def _case(compute: Callable[..., Pairs], dtype: mx.Dtype, width: int, tokens: int, **more) -> Case:
    names = {
        before: "hyper_in",
        head: "head_in",
        after: "hyper_out",
        mix: "hyper_mix",
        many: "hyper_mixes",
    }
    note = "".join(f", {name} {value:g}" for name, value in more.items())
    title = f"{names[compute]} {width}, {tokens} tokens{note}"
    return Case(title, dtype, partial(compute, dtype, width, tokens, **more))


def small() -> Iterator[Case]:
    """All kernels in both types, at a tiny model's widths and at such that leave lanes idle."""
    for dtype in (F32, mx.bfloat16):
        for width, tokens in ((64, 3), (168, 1)):
            yield _case(before, dtype, width, tokens)
            yield _case(head, dtype, width, tokens)
            yield _case(after, dtype, width, tokens)
            yield _case(after, dtype, width, tokens, outs=2)
            yield _case(mix, dtype, width, tokens)
            yield _case(many, dtype, width, tokens)
        yield _case(many, dtype, 40, 33)
        yield _case(before, dtype, 64, 9)
        yield _case(after, dtype, 40, 2, rows=STREAMS, outs=2)
    yield _case(mix, F32, 8, 8, rows=STREAMS)


def wide() -> Iterator[Case]:
    """The widths of Flash and Pro; weights far from even ones, and streams far from 1."""
    for dtype in (mx.bfloat16, F32):
        yield _case(before, dtype, 4096, 2)
        yield _case(head, dtype, 4096, 1)
        yield _case(after, dtype, 4096, 1)
        yield _case(after, dtype, 4096, 8, outs=2)
        yield _case(many, dtype, 4096, 3)
    yield _case(mix, mx.bfloat16, 4096, 1)
    yield _case(before, mx.bfloat16, 7168, 1)
    yield _case(after, mx.bfloat16, 7168, 2, rows=STREAMS, outs=2)
    yield _case(before, F32, 64, 8, steep=30.0)
    yield _case(before, F32, 64, 2, iterations=1)
    for scale in (1e-12, 1e15):
        yield _case(before, mx.bfloat16, 96, 2, scale=scale)
        yield _case(after, mx.bfloat16, 96, 2, scale=scale)
        yield _case(many, mx.bfloat16, 96, 2, scale=scale)


Timed = tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]


def timed(counts: Sequence[int] = (1, 2, 4, 8), width: int = 4096) -> Iterator[Timed]:
    """At Flash's width: (title, call(i, x), x, bytes moved); call depends on x."""
    dtype, matrices = mx.bfloat16, [fn_of(MIXES, width, seed) for seed in range(40)]
    norm, base, scale = norm_of(width, dtype), normal((MIXES,), F32, 2), normal((3,), F32, 3)
    for count in counts:
        streams, out = normal((count, 4, width), dtype, 1), normal((count, width), F32, 2)
        post, comb = normal((count, 4), F32, 6), mx.full((count, 4, 4), 0.25)
        sums = hyper_out.mix_by_kernel(streams, matrices[0])
        mx.eval(matrices, norm, base, scale, streams, out, post, comb, sums)

        def collapsed(_, x, streams=streams):
            weights = base, scale, norm
            return hyper_in.by_kernel(streams, x, *weights, iterations=20, **EPS)[2]

        def merge(i, x, streams=streams, post=post, comb=comb, outs=1):
            sides = post, comb, matrices[i % len(matrices)]
            return hyper_out.by_kernel(streams, [x] * outs, *sides)[1]

        moved = streams.nbytes + sums.nbytes
        yield f"hyper_in, {count} tokens", collapsed, sums, moved + count * width * 2
        moved += streams.nbytes + matrices[0].nbytes
        yield f"hyper_out, {count} tokens", merge, out, moved + out.nbytes
        yield f"hyper_out of two, {count}", partial(merge, outs=2), out, moved + 2 * out.nbytes
