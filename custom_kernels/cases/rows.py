"""A token's rows by the kernel beside those by plain operations, wherever the token stands."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.cases.base import Case, Forms, Pairs, normal
from ds4mlx.custom_kernels.layer import rows
from ds4mlx.custom_kernels.layer.buffers import Grown, Held, Recent, joined
from ds4mlx.custom_kernels.layer.row_layout import Form
from ds4mlx.custom_kernels.products.columns import side_by_side

EPS = 1e-6
TOKENS_OF_A_STEP, NUMBER = 3, 1  # and which of them it is
COMPRESSORS = {0: 0, 4: 2, 128: 1}
SEED, EACH = 100, 5  # the first key, and keys of a compressor
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


def beside(token: Token, number: int, ratio: int) -> Token:
    """Where a token of another sequence stands: further on, as far from the first of its tails."""
    moved, behind = 3 * number, token.position // max(ratio, 1) - token.rows
    position = token.position + moved
    rows = max(0, position // ratio - behind) if ratio else 0
    return Token(position, token.settled + moved, rows)


def held_of(
    ratio: int, sizes: Sizes, token: Token, forms: Sequence[Form], dtype: mx.Dtype, seed: int
) -> Held:
    """What a state holds of a layer when a token comes. Rows of no token are NaN."""

    def recent(key: int, keep: int, *row: int) -> mx.array:
        """Projections; NaN where there is no token yet, or any more."""
        places = mx.arange(token.settled - keep, token.settled + sizes.span)
        there = (places >= 0) & (places < token.position)
        values = normal((keep + sizes.span, *row), mx.float32, key)
        return mx.where(there.reshape(-1, *[1] * len(row)), values, mx.nan)

    def packed(key: int, form: Form, count: int) -> mx.array:
        return form.pack(normal((count, form.layout.width), dtype, key))

    lanes, tail = (2, sizes.tails[0]) if ratio == 4 else (1, sizes.tails[1])
    befores, tails = [packed(seed, forms[0], KEEP[0])], [packed(seed + 1, forms[0], sizes.span)]
    for number, form in enumerate(forms[: COMPRESSORS[ratio]]):
        key = seed + 5 + EACH * number
        projections = recent(key, KEEP[ratio], 2, lanes * form.layout.width)
        befores += [projections[: KEEP[ratio]], packed(key + 1, form, 8)]
        tails += [projections[KEEP[ratio] :], packed(key + 2, form, tail)]
    own = joined(tails)
    pairs = zip(befores[1::2], own[1::2], befores[2::2], own[2::2], strict=True)
    poolings = [(Recent(old, near), Grown(full, far)) for old, near, full, far in pairs]
    return Held(Recent(befores[0], own[0]), poolings)


def operands(
    ratio: int,
    sizes: Sizes,
    token: Token,
    forms: tuple[Form, Form],
    dtype: mx.Dtype,
    others: int = 0,
) -> tuple[list[Any], dict[str, Any]]:
    """What `new_rows` is given: arrays, and options.

    The token is the second of three, beside whose products stand others that nothing here reads; and so
    many tokens of other sequences, which are told to be one of the three.
    """

    def some(key: int, *shape: int, scale: float = 1.0, dtype: mx.Dtype = mx.float32) -> mx.array:
        return normal(shape, dtype, SEED + key, scale)

    lanes, own_forms = 2 if ratio == 4 else 1, forms[: COMPRESSORS[ratio]]
    widths = [sizes.rank, sizes.width]
    widths += [lanes * form.layout.width for form in own_forms for _ in range(2)]
    products = some(2, TOKENS_OF_A_STEP, sum(widths) + 4, scale=2.0)
    latent, kv, *projections = side_by_side(products, widths)
    poolings = []
    for number, form in enumerate(own_forms):
        values, scores = projections[2 * number : 2 * number + 2]
        bias = some(3 + EACH * number, ratio, values.width, dtype=mx.bfloat16)
        norm = 1 + some(4 + EACH * number, form.layout.width, scale=0.2, dtype=dtype)
        poolings.append(rows.Pooling(values, scores, bias, norm, form, form.layout.kind == "index"))
    last = 3 + EACH * len(own_forms)
    norms = [
        1 + some(last + i, n, scale=0.2, dtype=dtype)
        for i, n in enumerate((sizes.width, sizes.rank))
    ]
    turns = (TOKENS_OF_A_STEP, 4, 1, sizes.rope // 2)
    turns = mx.random.uniform(-3, 3, turns, key=mx.random.key(9))
    angles = mx.concatenate([mx.cos(turns), mx.sin(turns)], axis=2)
    tokens = [beside(token, number, ratio) for number in range(others + 1)]
    held = [
        held_of(ratio, sizes, each, forms, dtype, SEED + 20 * n) for n, each in enumerate(tokens)
    ]
    told = [(each.position, each.settled, each.rows, each.rows) for each in tokens]
    places = [[*own, (NUMBER + n) % TOKENS_OF_A_STEP, 0, 0, 0] for n, own in enumerate(told)]
    arrays = [kv, latent, *norms, poolings, held, mx.array(places, dtype=mx.int32), angles]
    return arrays, {"ratio": ratio, "form": forms[0], "eps": EPS, "dtype": dtype}


def compare(
    ratio: int,
    sizes: Sizes,
    token: Token,
    coded: bool,
    dtype: mx.Dtype,
    forms: Forms,
    others: int = 0,
) -> Pairs:
    """What the kernel gave, and what plain operations give."""
    kinds = forms(sizes.width, sizes.index, sizes.rope, dtype, coded)
    arrays, options = operands(ratio, sizes, token, kinds, dtype, others)
    kernel, plain = (side(*arrays, **options) for side in (rows.by_kernel, rows.plain))
    pairs: Pairs = [(kernel.latents, plain.latents)]
    for found, expected, given in zip(kernel.held, plain.held, arrays[5], strict=True):
        made, wanted, before = (
            [tail.value for tail in own.tails] for own in (found, expected, given)
        )
        pairs += unpacked(made[0], wanted[0], before[0], kinds[0])
        for i, form in enumerate(kinds[: COMPRESSORS[ratio]]):
            got, want = made[2 * i + 1], wanted[2 * i + 1]
            known = ~mx.isnan(want)
            pairs += [(known, ~mx.isnan(got)), (mx.where(known, got, 0), mx.where(known, want, 0))]
            pairs += unpacked(made[2 * i + 2], wanted[2 * i + 2], before[2 * i + 2], form)
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
    for ratio, others in ((0, 1), (4, 5), (128, 2)):  # the states of several sequences
        token = at(1023, ratio, TINY, 7, 1)
        yield _case(ratio, TINY, token, True, mx.bfloat16, forms, others)
    yield _case(4, ODD, at(1023, 4, ODD, 3, 1), False, mx.float32, forms, 1)


def wide(forms: Forms) -> Iterator[Case]:
    """Flash's sizes, where a row is completed and where none is."""
    for ratio, position in ((0, 300), (4, 1_000_003), (4, 302), (128, 1_000_063), (128, 300)):
        for dtype in (mx.bfloat16, mx.float32):
            token = at(position, ratio, FLASH, 20, 5)
            yield _case(ratio, FLASH, token, True, dtype, forms)
    yield _case(4, FLASH, at(7, 4, FLASH, 7, 1), False, mx.bfloat16, forms)
    yield _case(4, FLASH, at(1_000_003, 4, FLASH, 20, 5), True, mx.bfloat16, forms, 3)


def _case(
    ratio: int,
    sizes: Sizes,
    token: Token,
    coded: bool,
    dtype: mx.Dtype,
    forms: Forms,
    others: int = 0,
) -> Case:
    rounding = "coded" if coded else "plain"
    call = partial(compare, ratio, sizes, token, coded, dtype, forms, others)
    name = f"rows {ratio}, {sizes}, {rounding}, {token}"
    return Case(name + f" and {others} more" * (others > 0), dtype, call)


def timed(forms: Forms) -> Iterator[tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]]:
    """Titles, calls of one launch that depend on an array, that array, and the bytes that move."""
    for ratio, position in ((0, 1000), (4, 1001), (4, 1003), (128, 1000), (128, 1023)):
        kinds = forms(FLASH.width, FLASH.index, FLASH.rope, mx.bfloat16, True)
        token = at(position, ratio, FLASH, 20, 5)
        arrays, options = operands(ratio, FLASH, token, kinds, mx.bfloat16)
        mx.eval(arrays)

        def call(i: int, products: mx.array, arrays=arrays, options=options) -> mx.array:
            """The tails, from products."""
            return rows.by_kernel(*over(products, arrays), **options).held[0].array

        title = f"rows of ratio {ratio} at position {position}"
        moved = 4 * sum(tail.form.words for tail in arrays[5][0].tails)
        yield title, call, arrays[0].array, 2 * moved


def over(products: mx.array, arrays: list[Any]) -> list[Any]:
    """The same operands with other products."""
    kv, latent, kv_norm, q_norm, poolings, *rest = arrays
    kv, latent = (each._replace(array=products) for each in (kv, latent))
    others = [
        each._replace(
            values=each.values._replace(array=products), scores=each.scores._replace(array=products)
        )
        for each in poolings
    ]
    return [kv, latent, kv_norm, q_norm, others, *rest]
