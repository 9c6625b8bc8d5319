"""A token's rows by the kernel beside those by plain operations, wherever the token stands."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.cases.base import Case, Forms, Pairs, normal
from ds4mlx.custom_kernels.layer import rows
from ds4mlx.custom_kernels.layer.buffers import Grown, Recent
from ds4mlx.custom_kernels.layer.row_layout import Form
from ds4mlx.custom_kernels.products.columns import side_by_side

EPS = 1e-6
TOKENS_OF_A_STEP, NUMBER = 3, 1  # and which of them it is
KEEP = {0: 255, 4: 135, 128: 255}  # settled projections; of the window as many as of ratio 128


@dataclass(frozen=True)
class Sizes:
    """Channels of KV rows and index rows, those that turn, the latent's, and rows of the tails."""

    width: int
    index: int
    rope: int
    rank: int
    span: int
    tails: tuple[int, int]  # of ratio 4 and 128

    def __str__(self) -> str:
        return f"{self.width}+{self.index} of {self.rope}, {self.rank}"


TINY = Sizes(128, 128, 64, 128, 32, (16, 4))
ODD = Sizes(192, 64, 64, 96, 5, (3, 2))
FLASH = Sizes(512, 128, 64, 1024, 32, (256, 8))


@dataclass(frozen=True)
class Token:
    """Where a token stands: its position, the first of the tails, and the compressed rows settled."""

    position: int
    settled: int
    rows: int = 0


def at(position: int, ratio: int, sizes: Sizes, back: int = 0, behind: int = 0) -> Token:
    """A token so many places behind the first of the tails, and rows behind the first of theirs."""
    completed = position // ratio if ratio else 0
    return Token(position, position - min(back, position), completed - min(behind, completed))


def operands(
    ratio: int, sizes: Sizes, token: Token, forms: tuple[Form, Form], dtype: mx.Dtype
) -> tuple[list[Any], dict[str, Any]]:
    """What `new_rows` is given: arrays, and options. Rows of no token are NaN.

    The token is the second of three, beside whose products stand others that nothing here reads.
    """
    keys = iter(range(100, 200))

    def some(*shape: int, scale: float = 1.0, dtype: mx.Dtype = mx.float32) -> mx.array:
        return normal(shape, dtype, next(keys), scale)

    def recent(keep: int, *row: int) -> Recent:
        """Projections; NaN where there is no token yet, or any more."""
        places = mx.arange(token.settled - keep, token.settled + sizes.span)
        there = (places >= 0) & (places < token.position)
        values = mx.where(there.reshape(-1, *[1] * len(row)), some(keep + sizes.span, *row), mx.nan)
        return Recent(values[:keep], values[keep:])

    def packed(form: Form, count: int) -> mx.array:
        return form.pack(some(count, form.layout.width, dtype=dtype))

    kv_form, index_form = forms
    window = Recent(packed(kv_form, KEEP[0]), packed(kv_form, sizes.span))
    poolings = []
    lanes = 2 if ratio == 4 else 1
    own_forms = {0: (), 4: (kv_form, index_form), 128: (kv_form,)}[ratio]
    widths = [sizes.rank, sizes.width]
    widths += [lanes * form.layout.width for form in own_forms for _ in range(2)]
    products = some(TOKENS_OF_A_STEP, sum(widths) + 4, scale=2.0)
    latent, kv, *projections = side_by_side(products, widths)
    for number, form in enumerate(own_forms):
        width = form.layout.width
        channels, tail = lanes * width, sizes.tails[ratio != 4]
        pooling = rows.Pooling(
            projections[2 * number],
            projections[2 * number + 1],
            some(ratio, channels, dtype=mx.bfloat16),
            1 + some(width, scale=0.2, dtype=dtype),
            recent(KEEP[ratio], 2, channels),
            Grown(packed(form, 8), packed(form, tail)),
            form,
            form.layout.kind == "index",
        )
        poolings.append(pooling)
    norms = [1 + some(n, scale=0.2, dtype=dtype) for n in (sizes.width, sizes.rank)]
    turns = (TOKENS_OF_A_STEP, 4, 1, sizes.rope // 2)
    turns = mx.random.uniform(-3, 3, turns, key=mx.random.key(9))
    angles = mx.concatenate([mx.cos(turns), mx.sin(turns)], axis=2)
    place = [token.position, token.settled, token.rows, token.rows, NUMBER, 0, 0, 0]
    arrays = [kv, latent, *norms, window, poolings, mx.array(place, dtype=mx.int32), angles]
    options = {"ratio": ratio, "form": kv_form, "eps": EPS, "dtype": dtype}
    return arrays, options | {"latents": token.position % 3 > 0}


def compare(
    ratio: int, sizes: Sizes, token: Token, coded: bool, dtype: mx.Dtype, forms: Forms
) -> Pairs:
    """What the kernel gave, and what plain operations give."""
    kinds = forms(sizes.width, sizes.index, sizes.rope, dtype, coded)
    arrays, options = operands(ratio, sizes, token, kinds, dtype)
    got, want = (side(*arrays, **options) for side in (rows.by_kernel, rows.plain))
    pairs: Pairs = []
    if options["latents"]:
        assert got.latents is not None and want.latents is not None
        pairs.append((got.latents, want.latents))
    pairs += unpacked(got.window, want.window, arrays[4].tail, kinds[0])
    poolings = zip(got.poolings, want.poolings, arrays[5], strict=True)
    for (recent, own), (expected, all_rows), given in poolings:
        known = ~mx.isnan(expected)
        pairs += [
            (known, ~mx.isnan(recent)),
            (mx.where(known, recent, 0), mx.where(known, expected, 0)),
        ]
        pairs += unpacked(own, all_rows, given.rows.tail, given.form)
    return pairs


def unpacked(got: mx.array, want: mx.array, old: mx.array, form: Form) -> Pairs:
    """Rows' values; those that stay the same to the bit, new ones but for rare steps of a code."""
    same = (want == old).all(axis=1, keepdims=True)
    stays = mx.where(same, got == want, True)
    a, b = form.unpack(got), form.unpack(want)
    if form.layout.kind == "plain":
        return [(stays, mx.ones_like(stays)), (a, b)]
    return [(stays, mx.ones_like(stays)), stepped(a, b, form, a.shape[1] // 30)]


def stepped(a: mx.array, b: mx.array, form: Form, most: int) -> tuple[mx.array, mx.array]:
    """Values of rows that a form rounds, but for at most so many steps of a code, or two.

    A code is off by one where float32's last digits, or those of T, put a value beyond a tie.
    """
    near, small = (0.126, 0.1) if form.layout.kind == "kv" else (0.6, 0.2)
    step = mx.abs(a - b) <= near * mx.maximum(mx.abs(a), mx.abs(b))
    tiny = mx.abs(a - b) <= small * mx.abs(b).max()
    off = (a != b) & (step | tiny)
    off = off & (off.sum() <= max(2, most))
    return mx.where(off, b, a), b


TOKENS = {
    0: ((0, 0), (7, 3), (128, 31), (1_000_003, 17)),
    4: ((0, 0), (3, 3), (7, 1), (8, 8), (127, 31), (255, 0), (1_000_003, 30), (1_000_002, 2)),
    128: ((0, 0), (127, 31), (128, 0), (255, 4), (1_000_063, 0), (1_000_064, 20)),
}


def small(forms: Forms) -> Iterator[Case]:
    """Every ratio, both roundings and types, at odd sizes and a tiny model's."""
    for ratio, tokens in TOKENS.items():
        for number, (position, back) in enumerate(tokens):
            for dtype, sizes in ((mx.float32, ODD), (mx.bfloat16, TINY)):
                token = at(position, ratio, sizes, min(back, sizes.span - 1), number % 3)
                yield _case(ratio, sizes, token, number % 2 == 0, dtype, forms)
                if sizes == TINY and position % 4 == 3:
                    yield _case(ratio, sizes, token, number % 2 == 1, dtype, forms)


def wide(forms: Forms) -> Iterator[Case]:
    """Flash's sizes, where a row is completed and where none is."""
    for ratio, position in ((0, 300), (4, 1_000_003), (4, 302), (128, 1_000_063), (128, 300)):
        for dtype in (mx.bfloat16, mx.float32):
            token = at(position, ratio, FLASH, 20, 5)
            yield _case(ratio, FLASH, token, True, dtype, forms)
    yield _case(4, FLASH, at(7, 4, FLASH, 7, 1), False, mx.bfloat16, forms)


def _case(
    ratio: int, sizes: Sizes, token: Token, coded: bool, dtype: mx.Dtype, forms: Forms
) -> Case:
    rounding = "coded" if coded else "plain"
    call = partial(compare, ratio, sizes, token, coded, dtype, forms)
    return Case(f"rows {ratio}, {sizes}, {rounding}, {token}", dtype, call)


def timed(forms: Forms) -> Iterator[tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]]:
    """Titles, calls of one launch that depend on an array, that array, and the bytes that move."""
    for ratio, position in ((0, 1000), (4, 1001), (4, 1003), (128, 1000), (128, 1023)):
        kinds = forms(FLASH.width, FLASH.index, FLASH.rope, mx.bfloat16, True)
        token = at(position, ratio, FLASH, 20, 5)
        arrays, options = operands(ratio, FLASH, token, kinds, mx.bfloat16)
        mx.eval(arrays)
        tails = [arrays[4].tail, *(t.tail for each in arrays[5] for t in (each.recent, each.rows))]

        def call(i: int, products: mx.array, arrays=arrays, options=options) -> mx.array:
            """The window's tail, from products."""
            return rows.by_kernel(*over(products, arrays), **options).window

        title = f"rows of ratio {ratio} at position {position}"
        yield title, call, arrays[0].array, 2 * sum(tail.nbytes for tail in tails)


def over(products: mx.array, arrays: list[Any]) -> list[Any]:
    """The same operands with other products."""
    kv, latent, kv_norm, q_norm, window, poolings, *rest = arrays
    kv, latent = (each._replace(array=products) for each in (kv, latent))
    others = [
        each._replace(
            values=each.values._replace(array=products), scores=each.scores._replace(array=products)
        )
        for each in poolings
    ]
    return [kv, latent, kv_norm, q_norm, window, others, *rest]
