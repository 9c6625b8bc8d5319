"""A tiled product in float32: TALL rows of activations by 128 rows of a stored weight.

A kernel says which rows of activations and of the weight a threadgroup takes and what becomes of the
tiles; this file owns what is between: DEEP columns at a time are laid into threadgroup memory, of the
weight decoded, 32 columns by a thread, and eight SIMD-groups multiply 32 x SPAN tiles of them.
Neighbouring threads take neighbouring columns, so that a load meets few cache lines.
"""

from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.products import tiles

TALL, WIDE = 64, 128  # rows of activations and of the weight in a threadgroup's tile
THREADS = 256

# Afterwards lane l has in c[i][j].v row l / 2 and columns 8 (l % 2) .. + 7 of the tile. Words a kernel
# defines: COLUMNS, A_ROW(i) and GROUP(b, g), Group g of weight row b of the tile. So that
# all SIMD-groups have a share of a tile with few rows, each takes 16 of its upper and of its lower half.
LOOP = """
    threadgroup uint4 words[(TALL + WIDE) * LD / 4];
    threadgroup float* as = (threadgroup float*)words;
    threadgroup float* bs = as + TALL * LD;
    threadgroup uint4 lut[LUT];
    if (LUT > 1) {
        for (uint i = at; i < LUT; i += 256) lut[i] = ((const device uint4*)table)[i];
    }
    const uint across = SPAN / 16;
    TileC c[2][SPAN / 16];
    #pragma unroll
    for (uint i = 0; i < 2; i++) {
        #pragma unroll
        for (uint j = 0; j < across; j++) zero(c[i][j]);
    }
    uint down = sg / (256 / TALL) * 16, right = sg % (256 / TALL) * SPAN;
    // Of activations a thread copies 8 columns of some rows, of the weight it decodes 32 of one.
    const uint eights = DEEP / 8, groups = DEEP / 32;
    uint a = at / eights, b = at / groups, g = at % groups, filled = (rows + 15) / 16 * 16;
    uint mine[TALL * DEEP / 2048];
    #pragma unroll
    for (uint i = 0; i < TALL * DEEP / 2048; i++)
        mine[i] = A_ROW(min(a + 256 / eights * i, rows - 1)) * COLUMNS + at % eights * 8;
    Group group = GROUP(b, g);
    for (uint k = 0; k < COLUMNS / DEEP; k++) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        #pragma unroll
        for (uint i = 0; i < TALL * DEEP / 2048; i++) {
            uint row = a + 256 / eights * i;
            if (row < filled) copy8(as + row * LD + at % eights * 8, x + mine[i] + DEEP * k);
        }
        if (b < WIDE) {
            float v[32];
            values(group, v, lut);
            #pragma unroll
            for (uint i = 0; i < 4; i++) put8(bs + b * LD + 32 * g + 8 * i, v + 8 * i);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        group = GROUP(b, groups * min(k + 1, uint(COLUMNS / DEEP - 1)) + g);
        if (down >= rows) continue;
        #pragma unroll
        for (uint s = 0; s < DEEP / 16; s++) {
            TileA ta[2];
            load_a(ta[0], as + down * LD + 16 * s, lane);
            if (down + TALL / 2 < rows) load_a(ta[1], as + (down + TALL / 2) * LD + 16 * s, lane);
            #pragma unroll
            for (uint j = 0; j < across; j++) {
                TileB tb;
                load_b(tb, bs + (right + 16 * j) * LD + 16 * s, lane);
                mma(c[0][j], ta[0], tb, lane);
                if (down + TALL / 2 < rows) mma(c[1][j], ta[1], tb, lane);
            }
        }
    }
"""

START = """
    uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    uint at = thread_index_in_threadgroup;
"""


def kernel(
    name: str,
    format: str,
    inputs: list[str],
    output: str,
    body: str,
    defined: str,
) -> Kernel:
    """A kernel around LOOP for weights in a format."""
    sizes = f"#define TALL {TALL}\n#define WIDE {WIDE}\n#define SPAN (WIDE * TALL / 256)\n"
    text = sizes + defined + tiles.FLOAT + tiles.PRODUCTS + PACKINGS[format].decoding
    return Kernel(f"{name}_{format}", inputs, [output], body, text)
