"""Dense matrices times one to eight rows of activations: one launch reads every weight once.

Several matrices that take the same activations share a launch, whatever their formats, and an array of
results: every array costs the host, at every token. A SIMD-group makes R values for all rows of
activations, or shares long rows of a matrix with its neighbour: its lanes load 16 bytes of each of R
rows at a time and multiply in float32, so that no weight is ever written out wider than it is stored.
More rows of bfloat16 activations go through matrix units instead.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.dialect import Kernel, target
from ds4mlx.custom_kernels.products import dense_matvec_text as text
from ds4mlx.custom_kernels.products import dense_tiles_text as tiles
from ds4mlx.custom_kernels.words import LOAD8
from ds4mlx.formats import FORMATS, Planes

MOST = 8  # rows of activations
TILE = 16  # rows of a matrix that a threadgroup takes on matrix units
CHUNK = 128  # columns that matrix units take at a time
# Rows of activations from which on matrix units are used: on Metal, where none was measured, never.
TILED_FROM = {"cuda": 3, "metal": MOST + 1}
LONG = 8192  # columns of a row that several SIMD-groups go through best

# A threadgroup finds its matrix by its number; those of a group of rows are its own. Sizes are data, so
# that one kernel serves all matrices in the same formats.
_START = """
uint at = threadgroup_position_in_grid.x, lane = thread_index_in_simdgroup;
uint sub = simdgroup_index_in_threadgroup, begin = 0, every = {every};
uint columns = uint(x_shape[1 + GROUPED]), groups = GROUPED ? uint(x_shape[1]) : 1u, each, parts;
"""
_PART = """
each = uint(w{i}_weight_shape[0]) / groups, parts = (each - 1) / (SUBS / SPLIT * R) + 1;
if (at < parts * groups) {{
  {struct} w;
  {planes}
  uint group = at / parts, rows = (group + 1) * each, share = sub % SPLIT;
  uint row = (at % parts * (SUBS / SPLIT) + sub / SPLIT) * R + group * each;
  Rows<X> own = {{x + group * columns, groups * columns, uint(x_shape[0]) - 1}};
  float y[M];
  #pragma unroll
  for (int i = 0; i < M; i++) y[i] = 0;
  if (row < rows)
    multiply_from<{struct}, R, N, U, SPLIT>(w, own, y, row, rows, columns, 32 * U * share + lane);
  if (SPLIT > 1) gather<SPLIT, M>(y, sums, sub, lane);
  if (row < rows && share == 0)
    put<R, N, M>(y, own.last + 1, out + begin, every, row, rows, lane);
  return;
}}
at -= parts * groups;
begin += groups * each;
"""
_TILE = """
each = uint(w{i}_weight_shape[0]) / groups, parts = (each - 1) / 16 + 1;
if (at < parts * groups) {{
  {struct} w;
  {planes}
  uint group = at / parts, row = at % parts * 16 + group * each;
  tile<{struct}, SUBS>(w, x + group * columns, groups * columns, uint(x_shape[0]), out + begin, every,
                          row, (group + 1) * each, columns, sums, sub, lane);
  return;
}}
at -= parts * groups;
begin += groups * each;
"""

# What SIMD-groups add up: of a tile, or of rows that several share.
_TILE_SUMS = "threadgroup float sums[SUBS * 128];\n"
_ROW_SUMS = "threadgroup float sums[SPLIT > 1 ? SUBS * 32 * M : 1];\n"

Matrices = Sequence[tuple[str, Planes]]


@dataclass(frozen=True)
class Cut:
    """How the work of a launch is cut: rows and columns of every matrix, groups of rows, tokens made up.

    The numbers are those that an H100 was fastest with.
    """

    rows: tuple[int, ...]
    columns: int
    groups: int
    tokens: int
    tiled: bool = False

    @property
    def subs(self) -> int:
        """SIMD-groups of a threadgroup."""
        if self.tiled:
            return 8 if self.columns >= LONG else 4
        return 8 if self.tokens == 1 else 4

    @property
    def split(self) -> int:
        """SIMD-groups that share a row."""
        return 2 if self.tokens == 1 and self.columns >= LONG else 1

    @property
    def height(self) -> int:
        """Rows that a SIMD-group takes: few where few rows would leave a large GPU's memory idle."""
        filled = 4096 if self.tokens == 1 else 1024
        return next((r for r in (4, 2) if sum(self.rows) >= r * filled), 1)

    @property
    def steps(self) -> int:
        """Pieces of each row that a lane loads at a time."""
        if self.tokens == 1:
            return min(2, 4 // self.height)
        return 1 if self.tokens > 4 else max(2, 4 // self.height)

    @property
    def sums(self) -> int:
        """Sums of a SIMD-group, made up to a power of two."""
        return 1 << (self.height * self.tokens - 1).bit_length()

    def parts(self) -> list[int]:
        """Threadgroups of each matrix."""
        each = TILE if self.tiled else self.subs // self.split * self.height
        return [self.groups * -(-(rows // self.groups) // each) for rows in self.rows]

    def template(self) -> list[tuple[str, int]]:
        """The template's numbers."""
        if self.tiled:
            return [("SUBS", self.subs)]
        return [
            ("SUBS", self.subs),
            ("N", self.tokens),
            ("R", self.height),
            ("U", self.steps),
            ("M", self.sums),
            ("SPLIT", self.split),
        ]


@lru_cache
def kernel(formats: tuple[str, ...], tiled: bool) -> Kernel:
    """The kernel of matrices in these formats, on matrix units or not."""
    every = " + ".join(f"uint(w{i}_weight_shape[0])" for i in range(len(formats)))
    inputs, body = ["x"], _START.format(every=every)
    body += _TILE_SUMS if tiled else _ROW_SUMS
    for i, name in enumerate(formats):
        planes = tuple(FORMATS[name].layout)
        inputs += [f"w{i}_{p}" for p in planes]
        taken = " ".join(f"w.{p} = w{i}_{p};" for p in planes)
        body += (_TILE if tiled else _PART).format(i=i, struct=text.STRUCTS[name], planes=taken)
    kinds, outputs = dict.fromkeys(formats), ["out"]
    header = LOAD8 + text.LOAD4 + "".join(text.FORMATS[name] for name in kinds)
    if not tiled:
        return Kernel(_name(formats), inputs, outputs, body, header + text.PRODUCT)
    header += "".join(tiles.FORMATS[name] for name in kinds) + tiles.PRODUCT
    name = _name(formats, tiled)
    return Kernel(name, inputs, outputs, body, header, metal=tiles.METAL, cuda=tiles.CUDA)


def _name(formats: Iterable[str], tiled: bool = False) -> str:
    return "_".join(("dense_tiles" if tiled else "dense_matvec", *formats))


def _tiled(formats: Iterable[str], x: mx.array) -> bool:
    """Whether matrix units multiply x: where they are faster, and bfloat16 has room for all numbers."""
    exact = x.dtype == mx.bfloat16 and all(name in tiles.FORMATS for name in formats)
    fewest = TILED_FROM[target() or "metal"]
    return exact and len(x) >= fewest and x.shape[-1] % CHUNK == 0


def dense_matvec(matrices: Matrices, x: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """x . W^T for every matrix, in one launch: (N, all rows) of type `dtype`, side by side.

    matrices: (format, planes of (rows, columns)); x (N, columns), or (N, G, columns), where row i of
    a matrix meets group i // (rows / G). Sums are float32.
    """
    way = by_kernel if takes(matrices, x) else plain
    return way(matrices, x, dtype)


def takes(matrices: Matrices, x: mx.array) -> bool:
    """Whether the kernel multiplies x by the matrices."""
    return fits([name for name, _ in matrices], x)


def fits(formats: Iterable[str], x: mx.array) -> bool:
    """Whether the kernel multiplies x (N, columns) or (N, G, columns) by matrices in these formats."""
    kinds = list(dict.fromkeys(formats))
    if len(x) > MOST or not all(kind in text.COLUMNS for kind in kinds):
        return False
    if any(x.shape[-1] % text.COLUMNS[kind] for kind in kinds):
        return False
    tiled = _tiled(kinds, x)
    return dispatch.active(x, *(_name([kind], tiled) for kind in kinds))


def plain(matrices: Matrices, x: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """`dense_matvec` by MLX's own operations."""
    x = x.astype(mx.float32)
    if x.ndim == 2:
        results = [FORMATS[name].matmul(planes, x) for name, planes in matrices]
        return mx.concatenate(results, axis=-1).astype(dtype)
    groups, rows = x.shape[1], x.swapaxes(0, 1)
    results = []
    for name, planes in matrices:
        stacked = {p: a.reshape(groups, -1, a.shape[-1]) for p, a in planes.items()}
        results.append(FORMATS[name].matmul(stacked, rows).swapaxes(0, 1).reshape(len(x), -1))
    return mx.concatenate(results, axis=-1).astype(dtype)


def by_kernel(matrices: Matrices, x: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """`dense_matvec` in one launch; N is at most MOST, columns a multiple of a piece's."""
    tokens, *grouped, _ = x.shape
    groups = (grouped or [1])[0]
    formats = tuple(name for name, _ in matrices)
    tiled = _tiled(formats, x)
    rows = tuple(planes["weight"].shape[0] for _, planes in matrices)
    cut = Cut(rows, x.shape[-1], groups, dispatch.made_up(tokens), tiled)
    return kernel(formats, tiled)(
        [x, *(planes[p] for name, planes in matrices for p in FORMATS[name].layout)],
        [((tokens, sum(cut.rows)), dtype)],
        groups=(sum(cut.parts()), 1, 1),
        threads=32 * cut.subs,
        template=[
            ("GROUPED", len(grouped)),
            *([] if tiled else [("X", x.dtype)]),
            *cut.template(),
        ],
    )[0]
