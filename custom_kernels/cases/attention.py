"""Core attention by the kernels beside plain operations, wherever the token and its rows stand."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.cases.base import Case, Forms, Pairs, normal
from ds4mlx.custom_kernels.layer import attention
from ds4mlx.custom_kernels.layer.buffers import Grown, Recent, joined
from ds4mlx.custom_kernels.layer.row_layout import Form
from ds4mlx.custom_kernels.products.columns import Columns

EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Heads, channels and those that turn; rows seen before the token's, kept before the tail, in it."""

    heads: int
    width: int
    rope: int
    before: int = 127
    keep: int = 255
    span: int = 32

    def __str__(self) -> str:
        return f"{self.heads} x {self.width} of {self.rope}"


TINY, ODD = Sizes(4, 128, 64), Sizes(11, 256, 36, 6, 13, 5)
FLASH = Sizes(64, 512, 64)


@dataclass(frozen=True)
class Token:
    """A position, the rows behind the first of the tails, and how many rows are chosen, if any are."""

    position: int
    back: int = 0
    behind: int = 0  # compressed rows that are not settled
    chosen: int = 0


def operands(
    ratio: int, sizes: Sizes, tokens: Sequence[Token], form: Form, dtype: mx.Dtype
) -> tuple[list[Any], dict[str, Any]]:
    """What `attention` is given: arrays, and options. Rows that it must not read are NaN."""
    reads, places, chosen = [], [], []
    for number, token in enumerate(tokens):
        read, place, named = _read(ratio, sizes, token, form, dtype, 10 * number)
        reads.append(read)
        places.append([*place, number, len(chosen) if named is not None else -1, 0, 0])
        chosen += [] if named is None else [named]
    many, every = len(tokens), sizes.heads * sizes.width
    turns = mx.random.uniform(-3, 3, (many, 4, 1, sizes.rope // 2), key=mx.random.key(9))
    angles = mx.concatenate([mx.cos(turns), mx.sin(turns)], axis=2)
    q = Columns(normal((many, 8 + every), mx.float32, 5, 3.0), 4, every)
    sink = normal((sizes.heads,), mx.float32, 6, 2.0)
    options = {"ratio": ratio, "before": sizes.before, "form": form, "eps": EPS, "dtype": dtype}
    told = mx.array(places, dtype=mx.int32)
    return [q, sink, reads, mx.stack(chosen) if chosen else None, told, angles], options


def _read(
    ratio: int, sizes: Sizes, token: Token, form: Form, dtype: mx.Dtype, seed: int
) -> tuple[attention.Read, list[int], mx.array | None]:
    """What a token reads, where it stands, and the rows chosen for it."""
    position, settled = token.position, token.position - min(token.back, token.position)
    nothing = form.pack(mx.full((1, sizes.width), mx.nan, dtype=dtype))

    def packed(there: mx.array, number: int) -> mx.array:
        rows = form.pack(normal((len(there), sizes.width), dtype, seed + number))
        return mx.where(there[:, None], rows, nothing)

    places = mx.arange(settled - sizes.keep, settled + sizes.span)
    near = (places >= max(0, position - sizes.before)) & (places <= position)
    lying = packed(near, 1)
    visible = (position + 1) // ratio if ratio else 0
    done = visible - min(token.behind, visible)
    chosen = None
    newer = packed(mx.arange(token.behind + 3) < visible - done, 3)
    # As in a state there are others between the tails of the window and of the rows.
    recent, _, grown = joined([lying[sizes.keep :], mx.full((7, 2), mx.nan), newer])
    window = Recent(lying[: sizes.keep], recent)
    rows = Grown(packed(mx.arange(done + 2) < done, 2), grown) if ratio else None
    if token.chosen:
        order = mx.random.permutation(visible, key=mx.random.key(seed + 4))[: token.chosen]
        none = mx.full((token.chosen - len(order),), -1, dtype=mx.int32)
        chosen = mx.concatenate([order.astype(mx.int32), none])
    read = attention.Read(window, rows, chosen is not None)
    return read, [position, settled, done, done], chosen


def compare(
    ratio: int, sizes: Sizes, tokens: Sequence[Token], coded: bool, dtype: mx.Dtype, forms: Forms
) -> Pairs:
    """What the kernels gave, and what plain operations give."""
    form, _ = forms(sizes.width, 128, sizes.rope, dtype, coded)
    arrays, options = operands(ratio, sizes, tokens, form, dtype)
    return [(attention.by_kernel(*arrays, **options), attention.plain(*arrays, **options))]


NEAR = (
    *(Token(0), Token(1, 1), Token(30, 30), Token(31), Token(126, 5), Token(127, 31)),
    *(Token(128), Token(129, 31), Token(1_000_000, 31), Token(999_999)),
)
FAR = {
    4: (
        *(Token(330, 9, 5, 60), Token(214, 30, 17), Token(41, 3, 4, 20), Token(2), Token(3, 0, 1)),
        *(Token(151, 7, 38), Token(203), Token(2, 2, 0, 4), Token(4600, 5, 2), Token(4601, 5, 2)),
    ),
    128: (Token(126, 3), Token(127, 31, 1), Token(128, 0, 1), Token(5000, 8, 3)),
}


# With tokens that select rows and others that do not.
SEVERAL = (
    (0, (Token(20, 9), Token(300, 5))),
    (128, (Token(5), Token(127, 31, 1), Token(700, 8, 3))),
    (
        4,
        (*(Token(9), Token(151, 7, 5, 20), Token(203, 3), Token(1)), Token(90, 9, 5, 20), Token(3)),
    ),
)


def small(forms: Forms) -> Iterator[Case]:
    """Rows settled or not, all of them or those chosen, and windows at every kind of place."""
    for ratio, tokens in FAR.items():
        for number, token in enumerate(tokens):
            dtype = mx.float32 if number % 2 else mx.bfloat16
            yield _case(ratio, TINY, [token], number % 3 < 2, dtype, forms)
    for number, token in enumerate(NEAR):
        sizes, dtype = (TINY, mx.bfloat16) if number % 2 else (ODD, mx.float32)
        token = Token(token.position, min(token.back, sizes.span - 1))
        yield _case(0, sizes, [token], number % 3 > 0, dtype, forms)
    for ratio, tokens in SEVERAL:
        yield _case(ratio, TINY, tokens, True, mx.bfloat16, forms)


def wide(forms: Forms) -> Iterator[Case]:
    """Flash's sizes: a window with 512 rows chosen, alone, and with few rows and many."""
    sizes = Sizes(9, 512, 64)
    for ratio, token in (
        (4, Token(2600, 3, 100, 512)),
        (0, Token(1000, 20)),
        (128, Token(128 * 900 + 5, 31, 2)),
    ):
        for coded, dtype in ((True, mx.bfloat16), (True, mx.float32), (False, mx.bfloat16)):
            yield _case(ratio, sizes, [token], coded, dtype, forms)
    yield _case(128, sizes, [Token(1000, 31, 2)], False, mx.float32, forms)


def _case(
    ratio: int, sizes: Sizes, tokens: Sequence[Token], coded: bool, dtype: mx.Dtype, forms: Forms
) -> Case:
    rounding = "coded" if coded else "plain"
    call = partial(compare, ratio, sizes, tokens, coded, dtype, forms)
    told = ", ".join(map(str, tokens))
    return Case(f"attention {ratio}, {sizes}, {rounding}, {told}", dtype, call)


def timed(forms: Forms) -> Iterator[tuple[str, Callable[[int, mx.array], mx.array], mx.array, int]]:
    """Titles, calls of both launches that depend on an array, that array, and the bytes of the rows."""
    for ratio, token, count in (
        (0, Token(1000, 20), 128),
        (4, Token(16_000, 20, 100, 512), 640),
        (128, Token(32_000, 20, 3), 378),
        (128, Token(1_000_000, 20, 3), 7940),
    ):
        form, _ = forms(FLASH.width, 128, FLASH.rope, mx.bfloat16, True)
        arrays, options = operands(ratio, FLASH, [token], form, mx.bfloat16)
        mx.eval(arrays)

        def call(i: int, q: mx.array, arrays=arrays, options=options) -> mx.array:
            """The heads' outputs, from a product q."""
            return attention.by_kernel(arrays[0]._replace(array=q), *arrays[1:], **options)

        title = f"attention of ratio {ratio} over {count} rows"
        yield title, call, arrays[0].array, count * form.layout.elements * 4
