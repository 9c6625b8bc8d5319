"""The tiled product that prefill uses: 64 rows of activations by WIDE rows of a stored weight.

A kernel says which rows of activations and of the weight a threadgroup takes and what becomes of the
tiles; this file owns what is between: codes are decoded into threadgroup memory 32 columns at a time,
each by one thread, and eight SIMD-groups multiply 32 x WIDE / 4 tiles of them.
"""

import mlx.core as mx

from ds4mlx.custom_kernels import tiles
from ds4mlx.custom_kernels.dialect import LOAD8, Kernel
from ds4mlx.custom_kernels.packs import PACKINGS

TALL = 64  # rows of activations in a threadgroup's tile
THREADS = 256

# Words a kernel defines: COLUMNS, WIDE, A_ROW(i) and PACK(b, c), the Pack of weight row b of the tile.
LOOP = """
    threadgroup uint4 a_words[64 * LD * sizeof(element) / 16];
    threadgroup uint4 b_words[WIDE * LD * sizeof(element) / 16];
    threadgroup element* as = (threadgroup element*)a_words;
    threadgroup element* bs = (threadgroup element*)b_words;
    threadgroup uint4 lut[LUT];
    if (LUT > 1) {
        for (uint i = at; i < LUT; i += 256) lut[i] = ((const device uint4*)table)[i];
    }
    const uint across = WIDE / 64;
    TileC c[2][WIDE / 64];
    #pragma unroll
    for (uint i = 0; i < 2; i++) {
        #pragma unroll
        for (uint j = 0; j < across; j++) zero(c[i][j]);
    }
    uint down = sg / 4 * 32, right = sg % 4 * (WIDE / 4);
    const device T* mine = x + A_ROW(min(at / 4, rows - 1)) * COLUMNS + at % 4 * 8;
    float a[8];
    load8(mine, a);
    Pack pack = PACK(min(at, uint(WIDE - 1)), 0);
    for (uint k = 0; k < COLUMNS / 64; k++) {
        #pragma unroll
        for (uint h = 0; h < 2; h++) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            put8(as + at / 4 * LD + at % 4 * 8, a);
            if (at < WIDE) {
                float v[32];
                values(pack, h, v, lut);
                #pragma unroll
                for (uint i = 0; i < 4; i++) put8(bs + at * LD + 8 * i, v + 8 * i);
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            uint next = min(64 * k + 32 * h + 32, uint(COLUMNS - 32));
            load8(mine + next, a);
            if (h == 1) pack = PACK(min(at, uint(WIDE - 1)), min(k + 1, uint(COLUMNS / 64 - 1)));
            #pragma unroll
            for (uint s = 0; s < 2; s++) {
                TileA ta[2];
                #pragma unroll
                for (uint i = 0; i < 2; i++) load_a(ta[i], as + (down + 16 * i) * LD + 16 * s, lane);
                #pragma unroll
                for (uint j = 0; j < across; j++) {
                    TileB tb;
                    load_b(tb, bs + (right + 16 * j) * LD + 16 * s, lane);
                    #pragma unroll
                    for (uint i = 0; i < 2; i++)
                        if (down + 16 * i < rows) mma(c[i][j], ta[i], tb, lane);
                }
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup float* own = (threadgroup float*)bs + sg * 512;
"""

START = """
    uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    uint at = thread_index_in_threadgroup;
"""


def kernel(
    name: str,
    storage: str,
    dtype: mx.Dtype,
    inputs: list[str],
    output: str,
    body: str,
    defined: str,
) -> Kernel:
    """A kernel around LOOP for weights in a format and activations of a type."""
    metal, cuda, common = tiles.headers(dtype)
    text = defined + LOAD8 + common + PACKINGS[storage].decoding
    name = f"{name}_{storage}_{'f32' if dtype == mx.float32 else 'bf16'}"
    return Kernel(name, inputs, [output], body, text, metal=metal, cuda=cuda)
