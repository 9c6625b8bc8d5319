"""A tiled product whose weights are decoded where matrix units take them: in each lane's registers.

Of 16 rows of a weight and 32 columns lane (g, q) has eight columns of rows 2 g and 2 g + 1, which is
what a matrix unit wants of it once the columns are put in another order, and so no weight passes
through threadgroup memory. Columns are summed, so any order does that activations share: of 128 a lane
has the q-th group of 32, eight a step. Activations are copied some stages ahead. A SIMD-group takes two
times 16 rows of weights and all of a tile's rows of activations.
"""

import mlx.core as mx

from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.dialect import Kernel, target

COLUMNS = 128  # taken at a time: widths are multiples of it
# By the rows of a tile: SIMD-groups of a threadgroup, and stages of activations in threadgroup memory.
GROUPS = {32: 4, 64: 4, 128: 8}
STAGES = {32: 4, 64: 3, 128: 2}

METAL = """
#include <metal_simdgroup_matrix>
struct Weights { simdgroup_matrix<bfloat16_t, 8, 8> m[2][4]; };
struct Tokens { simdgroup_matrix<bfloat16_t, 8, 8> m[4]; };
struct Sums { simdgroup_matrix<float, 8, 8> m[2]; };
inline uint row_of(uint lane) { return lane / 16 * 4 + lane / 2 % 4; }
inline uint part_of(uint lane) { return lane / 8 % 2 * 2 + lane % 2; }
inline void clear(thread Sums& c) {
  for (int h = 0; h < 2; h++) c.m[h] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
inline void take(thread Weights& w, int h, const thread float* v) {
  for (int p = 0; p < 4; p++) {
    w.m[h][p].thread_elements()[0] = static_cast<bfloat16_t>(v[2 * p]);
    w.m[h][p].thread_elements()[1] = static_cast<bfloat16_t>(v[2 * p + 1]);
  }
}
// Of a token's 32 columns: pair p of the four lanes' eights lie side by side.
inline void copy8(threadgroup uint* row, uint q, const device bfloat16_t* from) {
  uint4 w = *(const device uint4*)from;
  row[q] = w.x; row[4 + q] = w.y; row[8 + q] = w.z; row[12 + q] = w.w;
}
inline void copies_end() {}
template <int N> inline void copied() {}
inline Tokens tokens(const threadgroup uint* rows, uint) {
  Tokens t;
  for (int p = 0; p < 4; p++)
    simdgroup_load(t.m[p], (const threadgroup bfloat16_t*)rows + 8 * p, 32, ulong2(0, 0), true);
  return t;
}
inline void multiply(thread Sums& c, const thread Weights& w, const thread Tokens& t, int u) {
  for (int h = 0; h < 2; h++)
    for (int p = 2 * u; p < 2 * u + 2; p++)
      simdgroup_multiply_accumulate(c.m[h], w.m[h][p], t.m[p], c.m[h]);
}
inline float sum(const thread Sums& c, int h, int e) { return c.m[h].thread_elements()[e]; }
"""

CUDA = """
struct Weights { uint r[2][4]; };
typedef uint4 Tokens;
struct Sums { float v[4]; };
inline uint row_of(uint lane) { return lane / 4; }
inline uint part_of(uint lane) { return lane % 4; }
inline void clear(Sums& c) { c.v[0] = c.v[1] = c.v[2] = c.v[3] = 0; }
inline void take(Weights& w, int h, const float* v) {
  #pragma unroll
  for (int p = 0; p < 4; p++) w.r[h][p] = two_bf16(v[2 * p], v[2 * p + 1]);
}
// Past the registers, while weights are decoded.
inline void copy8(uint* row, uint q, const bfloat16_t* from) {
  uint at = (uint)__cvta_generic_to_shared(row + 4 * q);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(at), "l"(from) : "memory");
}
inline void copies_end() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int N> inline void copied() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}
inline Tokens tokens(const uint* rows, uint lane) { return ((const uint4*)rows)[lane]; }
inline void multiply(Sums& c, const Weights& w, const Tokens& t, int u) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
               : "r"(w.r[0][2 * u]), "r"(w.r[1][2 * u]), "r"(w.r[0][2 * u + 1]),
                 "r"(w.r[1][2 * u + 1]), "r"(u ? t.z : t.x), "r"(u ? t.w : t.y));
}
inline float sum(const Sums& c, int h, int e) { return c.v[2 * h + e]; }
"""

# What a kernel defines: COLUMNS, A_ROW(i), the row of x that is row i of the tile, and GROUP(m, h, c), the
# lane's group of chunk c in row h of its m-th 16 rows. A stage has two steps: of each eight of a lane's
# columns all tokens', 64 bytes a token.
LOOP = """
    threadgroup uint words[STAGES * TALL * 32];
    threadgroup uint4 lut[LUT];
    if (LUT > 1) {
        for (uint i = at; i < LUT; i += 32 * GROUPS) lut[i] = ((const device uint4*)table)[i];
    }
    uint g = row_of(lane), q = part_of(lane), filled = (rows + 15) / 16 * 16;
    Sums c[2][TALL / 8];
    #pragma unroll
    for (uint t = 0; t < TALL / 8; t++) { clear(c[0][t]); clear(c[1][t]); }
    // A thread copies eight columns of some tokens: of the lanes' part `piece / 2` and step `piece % 2`.
    uint own = at / 8, piece = at % 8, mine[TALL / AT_ONCE];
    #pragma unroll
    for (uint i = 0; i < TALL / AT_ONCE; i++)
        mine[i] = A_ROW(min(own + AT_ONCE * i, rows - 1)) * COLUMNS + piece / 2 * 32 + piece % 2 * 8;
    const uint stages = COLUMNS / 64;
    #pragma unroll
    for (uint k = 0; k + 1 < STAGES; k++) {
        if (k < stages) FILL(k);
        copies_end();
    }
    Group now[2][2], next[2][2];
    #pragma unroll
    for (uint i = 0; i < 4; i++) now[i / 2][i % 2] = GROUP(i / 2, i % 2, 0);
    for (uint chunk = 0; chunk < COLUMNS / 128; chunk++) {
        uint ahead = min(chunk + 1, uint(COLUMNS / 128 - 1));
        #pragma unroll
        for (uint i = 0; i < 4; i++) next[i / 2][i % 2] = GROUP(i / 2, i % 2, ahead);
        #pragma unroll
        for (uint s = 0; s < 2; s++) {
            uint k = 2 * chunk + s;
            copied<STAGES - 2>();
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (k + STAGES - 1 < stages) FILL(k + STAGES - 1);
            copies_end();
            const threadgroup uint* stage = words + k % STAGES * (TALL * 32);
            #pragma unroll
            for (uint j = 0; j < 2; j++) {
                Weights w[2];
                #pragma unroll
                for (uint i = 0; i < 4; i++) {
                    float v[8];
                    eight(now[i / 2][i % 2], 2 * s + j, v, lut);
                    take(w[i / 2], i % 2, v);
                }
                #pragma unroll
                for (uint t = 0; t < TALL / 16; t++) {
                    if (16 * t >= rows) break;
                    const threadgroup uint* from = stage + (j * TALL + 16 * t) * 16;
                    Tokens left = tokens(from, lane), right = tokens(from + 128, lane);
                    #pragma unroll
                    for (int u = 0; u < 2; u++) {
                        multiply(c[0][2 * t], w[0], left, u);
                        multiply(c[1][2 * t], w[1], left, u);
                        multiply(c[0][2 * t + 1], w[0], right, u);
                        multiply(c[1][2 * t + 1], w[1], right, u);
                    }
                }
            }
        }
        #pragma unroll
        for (uint i = 0; i < 4; i++) now[i / 2][i % 2] = next[i / 2][i % 2];
    }
"""

START = """
    uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    uint at = thread_index_in_threadgroup, tile = threadgroup_position_in_grid.y;
    uint expert = uint(tiles[4 * tile]), row0 = uint(tiles[4 * tile + 1]);
    uint rows = uint(tiles[4 * tile + 2]);
    if (rows == 0) return;
"""

DEFINED = """
#define AT_ONCE (4 * GROUPS)
#define FILL(k) \\
  for (uint i = 0; i < TALL / AT_ONCE; i++) { \\
    uint row = own + AT_ONCE * i; \\
    if (row < filled) \\
      copy8(words + (k) % STAGES * (TALL * 32) + (piece % 2 * TALL + row) * 16, piece / 2, \\
            x + mine[i] + (k) / 2 * 128 + (k) % 2 * 16); \\
  }
"""


def kernel(name: str, format: str, inputs: list[str], output: str, body: str, text: str) -> Kernel:
    """A kernel around LOOP for weights in a format and bfloat16 activations."""
    header = DEFINED + text + PACKINGS[format].decoding
    return Kernel(name, inputs, [output], body, header, metal=METAL, cuda=CUDA)


def template(columns: int, tall: int) -> list[tuple[str, int | mx.Dtype]]:
    """What LOOP is told: columns of a row, and rows of a tile."""
    sizes = [("TALL", tall), ("STAGES", STAGES[tall]), ("GROUPS", GROUPS[tall])]
    return [("COLUMNS", columns), *sizes]


def tall(rows: float) -> int:
    """Rows of a tile where a matrix has so many on average: as was fastest on an H100.

    Most matrices should need one tile, since each tile decodes. On Metal the tallest has no room.
    """
    if rows < 24:
        return 32
    return 128 if rows >= 40 and target() == "cuda" else 64
