"""The scores by which the lightning indexer's rows are chosen, for many tokens of one sequence.

One launch on matrix units, over rows as the state lays them out: products with single heads are never
in memory.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer import chunk_scores_text as text
from ds4mlx.custom_kernels.layer.row_layout import Form, RowLayout

RATIO = 4  # tokens to a row
NAME = "chunk_scores"
MANY = 64  # tokens that a threadgroup goes through
WIDEST, MOST_HEADS = 128, 64


@lru_cache
def kernel(narrow: bool) -> Kernel:
    """The kernel for rows of bfloat16 numbers once unpacked, or for float32 ones."""
    name = f"{NAME}_bf16" if narrow else f"{NAME}_f32"
    metal, cuda = (text.METAL_BF16, text.CUDA_BF16) if narrow else ("", "")
    header = text.BF16 if narrow else text.FLOAT
    inputs = ["q", "weights", "rows", "place"]
    return Kernel(name, inputs, ["scores"], text.body(narrow), header, metal=metal, cuda=cuda)


def chunk_scores(
    q: mx.array, weights: mx.array, rows: mx.array, start: int, form: Form
) -> mx.array:
    """Scores of rows (R, .), as `form` lays them out, float32 (L, R): sum_h w_h relu(q_h . k_j).

    q (L, H, c) of the tokens from position `start` on, as they are multiplied: of coded rows, rounded
    to E2M1 too. weights float32 (L, H). Rows that a token at p does not see, j >= (p + 1) // 4, get -inf.
    """
    if takes(q, rows, form.layout):
        return by_kernel(q, weights, rows, start, form.layout)
    return plain(q, weights, rows, start, form)


def takes(q: mx.array, rows: mx.array, layout: RowLayout) -> bool:
    """Whether the kernel takes such queries and rows."""
    heads, width = q.shape[1:]
    halves = width % 32 == 0 if layout.kind == "index" or width > 64 else width % 16 == 0
    typed = layout.kind == "index" or (layout.kind == "plain" and layout.dtype == q.dtype)
    sized = width == layout.width <= WIDEST and halves and heads <= MOST_HEADS
    enough = rows.size >= 8 and q.size >= 8 and len(q) <= dispatch.MOST_GROUPS
    return sized and typed and enough and dispatch.active(q, NAME)


def by_kernel(
    q: mx.array, weights: mx.array, rows: mx.array, start: int, layout: RowLayout, many: int = MANY
) -> mx.array:
    """`chunk_scores` in one launch, a threadgroup going through `many` tokens; see `takes`."""
    narrow, coded = layout.dtype != mx.float32, layout.kind == "index"
    length, heads, width = q.shape
    held = -(-heads // 16) * 16
    if coded:
        q = q.astype(mx.bfloat16)  # which has room for E2M1 codes and their scales
    weights = weights.astype(mx.float32)
    if held > heads:
        q = mx.pad(q, [(0, 0), (0, held - heads), (0, 0)])
        weights = mx.pad(weights, [(0, 0), (0, held - heads)])
    tiles, buffers = tiled(narrow)
    piece = width // 2 if width > 64 else width
    space = max(text.GROUPS * 16 * tiles * (piece + 8), buffers * held * (width + 8))
    template = [
        *(("HEADS", held), ("WIDTH", width), ("RATIO", RATIO), ("MANY", many)),
        *(("TILES", tiles), ("BUFFERS", buffers)),
    ]
    if narrow:
        words = layout.elements * layout.dtype.size // 4
        template += [
            ("CODED", int(coded)),
            ("WORDS", words),
            ("PIECE", piece),
            ("BYTES", 2 * space),
        ]
    place = mx.array([start, 0, 0, 0, 0, 0, 0, 0], dtype=mx.int32)
    return kernel(narrow)(
        [q, weights, rows, place],
        [((length, len(rows)), mx.float32)],
        groups=(-(-len(rows) // (16 * text.GROUPS * tiles)), -(-length // many), 1),
        threads=32 * text.GROUPS,
        template=template,
    )[0]


def tiled(narrow: bool) -> tuple[int, int]:
    """Tiles of rows that a SIMD-group keeps, and tokens whose heads there is memory for."""
    return (2, 2) if narrow and dialect.target() == "cuda" else (1, 1)


def plain(q: mx.array, weights: mx.array, rows: mx.array, start: int, form: Form) -> mx.array:
    """`chunk_scores` by MLX's own operations, all products at once."""
    hits = mx.maximum(q.astype(mx.float32) @ form.unpack(rows).T, 0)
    scores = (weights.astype(mx.float32)[:, None] @ hits).squeeze(1)
    seen = (start + 1 + mx.arange(len(q))) // RATIO
    return mx.where(mx.arange(len(rows)) < seen[:, None], scores, -mx.inf)
