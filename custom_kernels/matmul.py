"""The tiled product that prefill uses: TALL rows of activations by 128 rows of a stored weight.

A kernel says which rows of activations and of the weight a threadgroup takes and what becomes of the
tiles; this file owns what is between: codes are decoded into threadgroup memory 32 columns at a time,
each by one thread, and eight SIMD-groups multiply 32 x SPAN tiles of them.
"""

import mlx.core as mx

from ds4mlx.custom_kernels import tiles
from ds4mlx.custom_kernels.dialect import LOAD8, Kernel
from ds4mlx.custom_kernels.packs import PACKINGS

WIDE = 128  # rows of the weight in a threadgroup's tile
THREADS = 256

# Words a kernel defines: COLUMNS, A_ROW(i) and PACK(b, c), the Pack of weight row b of the tile. Of a
# tile with few rows all SIMD-groups have a share: each takes 16 of the upper and 16 of the lower half.
LOOP = """
    threadgroup uint4 words[(TALL + WIDE) * LD * sizeof(element) / 16];
    threadgroup element* as = (threadgroup element*)words;
    threadgroup element* bs = as + TALL * LD;
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
    uint b = at % WIDE, half_group = at / WIDE;
    const device T* mine[TALL / 64];
    Eight a[TALL / 64];
    #pragma unroll
    for (uint i = 0; i < TALL / 64; i++) {
        mine[i] = x + A_ROW(min(at / 4 + 64 * i, rows - 1)) * COLUMNS + at % 4 * 8;
        a[i] = take8(mine[i]);
    }
    Pack pack = PACK(b, 0);
    for (uint k = 0; k < COLUMNS / 64; k++) {
        #pragma unroll
        for (uint h = 0; h < 2; h++) {
            float v[16];
            threadgroup_barrier(mem_flags::mem_threadgroup);
            #pragma unroll
            for (uint i = 0; i < TALL / 64; i++) put8(as + (at / 4 + 64 * i) * LD + at % 4 * 8, a[i]);
            values(pack, h, half_group, v, lut);
            put8(bs + b * LD + 16 * half_group, v);
            put8(bs + b * LD + 16 * half_group + 8, v + 8);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            uint next = min(64 * k + 32 * h + 32, uint(COLUMNS - 32));
            #pragma unroll
            for (uint i = 0; i < TALL / 64; i++) a[i] = take8(mine[i] + next);
            if (h == 1) pack = PACK(b, min(k + 1, uint(COLUMNS / 64 - 1)));
            #pragma unroll
            for (uint s = 0; s < 2; s++) {
                TileA ta[2];
                #pragma unroll
                for (uint i = 0; i < 2; i++)
                    load_a(ta[i], as + (down + TALL / 2 * i) * LD + 16 * s, lane);
                #pragma unroll
                for (uint j = 0; j < across; j++) {
                    TileB tb;
                    load_b(tb, bs + (right + 16 * j) * LD + 16 * s, lane);
                    #pragma unroll
                    for (uint i = 0; i < 2; i++)
                        if (down + TALL / 2 * i < rows) mma(c[i][j], ta[i], tb, lane);
                }
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup float* own = (threadgroup float*)words + sg * 512;
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
    sizes = (
        f"#define TALL {tiles.rows(dtype)}\n#define WIDE {WIDE}\n#define SPAN (WIDE * TALL / 256)\n"
    )
    text = sizes + defined + LOAD8 + common + PACKINGS[storage].decoding
    name = f"{name}_{storage}_{'f32' if dtype == mx.float32 else 'bf16'}"
    return Kernel(name, inputs, [output], body, text, metal=metal, cuda=cuda)
