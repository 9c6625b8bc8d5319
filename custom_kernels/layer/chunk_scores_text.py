"""The text of the index scores of many tokens: a threadgroup has rows, and goes through tokens.

A SIMD-group unpacks its 16 * TILES rows once and keeps them in registers; heads of the tokens, which
come by turns, are multiplied with them 16 at a time. What is above 0 is weighted and summed over heads
where it lies: a row is held by the lanes that differ in FOLDS bits.
"""

from ds4mlx.custom_kernels.products import tiles

GROUPS = 8  # SIMD-groups of a threadgroup

# Where a lane's elements lie in a tile of 16 rows by 16 heads, and sums over the heads of one.
METAL_BF16 = (
    tiles.METAL_BF16
    + """
#define HALVES 2
#define FOLD_A 1
#define FOLD_B 8
inline uint row_of(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
inline void fold(thread TileC& c, const threadgroup float* w, thread float* sums, uint lane) {
  uint column = (lane / 4 & 2) * 2 + lane % 2 * 2;
  for (uint i = 0; i < 4; i++) {
    for (uint e = 0; e < 2; e++) {
      float v = c.m[i / 2][i % 2].thread_elements()[e];
      sums[i / 2] = fma(v < 0 ? 0.0f : v, w[column + i % 2 * 8 + e], sums[i / 2]);
    }
  }
}
"""
)
CUDA_BF16 = (
    tiles.CUDA_BF16
    + """
#define HALVES 2
#define FOLD_A 1
#define FOLD_B 2
inline uint row_of(uint lane) { return lane / 4; }
inline void fold(TileC& c, const float* w, float* sums, uint lane) {
  for (int i = 0; i < 8; i++) {
    float weight = w[i / 4 * 8 + lane % 4 * 2 + i % 2];
    sums[i / 2 % 2] = fma(c.v[i] < 0 ? 0.0f : c.v[i], weight, sums[i / 2 % 2]);
  }
}
"""
)

# Rows and queries of bfloat16 numbers pass through threadgroup memory.
BF16 = (
    tiles.BF16
    + """
template <int CODED, int WIDTH>
inline void eight(const device uint* row, uint c, threadgroup bfloat16_t* to) {
  if (!CODED) {
    *(threadgroup uint4*)to = *(const device uint4*)((const device bfloat16_t*)row + c);
    return;
  }
  uint w = row[c / 8], e = row[WIDTH / 8 + c / 128] >> (c / 32 % 4 * 8) & 255u;
  float scale = as_type<float>(e << 23) * 16384.0f, v[8];
  for (uint i = 0; i < 4; i++) {
    uint x = w >> (4 * i);
    half2 two = as_half2(((x & 0x00080008u) << 12) | ((x & 0x00070007u) << 9));
    v[i] = low(two) * scale;
    v[i + 4] = high(two) * scale;
  }
  put8(to, v);
}
#define QUERY(n) (queries + (n) % BUFFERS * HEADS * LDQ)
"""
)
FLOAT = """
typedef float element;
#define HALVES 1
#define FOLD_A 1
#define FOLD_B 0
#define copied()
struct TileA { const device float* p; };
typedef TileA TileB;
struct TileC { float v[8]; };
inline void zero(thread TileC& c) { for (int i = 0; i < 8; i++) c.v[i] = 0; }
inline void load_b(thread TileB& b, const device float* p, uint, uint) { b.p = p; }
#define mma(c, a, b, lane) multiply<WIDTH>(c, a, b, lane)
template <int WIDTH> inline void multiply(thread TileC& c, TileA a, TileB b, uint lane) {
  for (uint i = 0; i < 8; i++) {
    const device float* head = b.p + (lane % 2 * 8 + i) * WIDTH;
    for (uint k = 0; k < 16; k++) c.v[i] = fma(a.p[k], head[k], c.v[i]);
  }
}
inline uint row_of(uint lane) { return lane / 2; }
inline void fold(thread TileC& c, const threadgroup float* w, thread float* sums, uint lane) {
  for (uint i = 0; i < 8; i++)
    sums[0] = fma(c.v[i] < 0 ? 0.0f : c.v[i], w[lane % 2 * 8 + i], sums[0]);
}
#define QUERY(n) (q + (n) * (HEADS * WIDTH))
"""

_BEGIN = """
    threadgroup float shares[BUFFERS * HEADS];
    uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    uint id = 32 * sg + lane, count = uint(rows_shape[0]), tokens = uint(q_shape[0]);
    uint all = 8 * 16 * TILES, first = threadgroup_position_in_grid.x * all;
    uint row0 = first + sg * (16 * TILES);
    uint begin = threadgroup_position_in_grid.y * MANY, end = min(begin + MANY, tokens);
    if (first >= (uint(place[0]) + end) / RATIO) {
        for (uint n = begin; n < end; n++) {
            for (uint r = first + id; r < min(first + all, count); r += 256)
                scores[n * count + r] = -INFINITY;
        }
        return;
    }
    TileA keys[TILES][WIDTH / 16];
"""

_KEEP_BF16 = """
    const uint LDP = PIECE + 8, LDQ = WIDTH + 8;
    threadgroup uint4 words[BYTES / 16];
    threadgroup element* queries = (threadgroup element*)words;
    threadgroup element* own = queries + sg * (16 * TILES * LDP);
    #pragma unroll
    for (uint piece = 0; piece < WIDTH / PIECE; piece++) {
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = lane; i < 16 * TILES * (PIECE / 8); i += 32) {
            uint r = i / (PIECE / 8), c = i % (PIECE / 8) * 8;
            const device uint* row = (const device uint*)rows + min(row0 + r, count - 1) * WORDS;
            eight<CODED, WIDTH>(row, piece * PIECE + c, own + r * LDP + c);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        #pragma unroll
        for (uint t = 0; t < TILES; t++) {
            #pragma unroll
            for (uint k = 0; k < PIECE / 16; k++)
                load_a(keys[t][piece * (PIECE / 16) + k], own + 16 * t * LDP + 16 * k, lane, LDP);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
"""
_KEEP_FLOAT = """
    const uint LDQ = WIDTH;
    for (uint t = 0; t < TILES; t++) {
        for (uint k = 0; k < WIDTH / 16; k++)
            keys[t][k].p = rows + min(row0 + 16 * t + lane / 2, count - 1) * WIDTH + 16 * k;
    }
"""
_COPY_BF16 = """
            for (uint i = 8 * id; i < HEADS * WIDTH; i += 2048)
                copy8(QUERY(n) + i / WIDTH * LDQ + i % WIDTH, q + n * (HEADS * WIDTH) + i);
"""

# Where there are two buffers, the next token's heads are on their way meanwhile.
_SCORE = """
    for (uint n = begin; n < end + BUFFERS - 1; n++) {
        copied();
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (n < end) {
            COPY
            for (uint h = id; h < HEADS; h += 256)
                shares[n % BUFFERS * HEADS + h] = weights[n * HEADS + h];
        }
        if (BUFFERS == 1) {
            copied();
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        if (n < begin + BUFFERS - 1) continue;
        uint token = n - (BUFFERS - 1);
        float sums[TILES][HALVES];
        #pragma unroll
        for (uint t = 0; t < TILES; t++) {
            #pragma unroll
            for (uint i = 0; i < HALVES; i++) sums[t][i] = 0;
        }
        #pragma unroll 1
        for (uint h = 0; h < HEADS; h += 16) {
            TileC c[TILES];
            #pragma unroll
            for (uint t = 0; t < TILES; t++) zero(c[t]);
            #pragma unroll
            for (uint k = 0; k < WIDTH / 16; k++) {
                TileB b;
                load_b(b, QUERY(token) + h * LDQ + 16 * k, lane, LDQ);
                #pragma unroll
                for (uint t = 0; t < TILES; t++) mma(c[t], keys[t][k], b, lane);
            }
            #pragma unroll
            for (uint t = 0; t < TILES; t++)
                fold(c[t], shares + token % BUFFERS * HEADS + h, sums[t], lane);
        }
        uint visible = (uint(place[0]) + token + 1) / RATIO;
        #pragma unroll
        for (uint t = 0; t < TILES; t++) {
            #pragma unroll
            for (uint i = 0; i < HALVES; i++) {
                float s = sums[t][i] + simd_shuffle_xor(sums[t][i], FOLD_A);
                if (FOLD_B) s += simd_shuffle_xor(s, FOLD_B);
                uint row = row0 + 16 * t + 8 * i + row_of(lane);
                if ((lane & (FOLD_A | FOLD_B)) == 0 && row < count)
                    scores[token * count + row] = row < visible ? s : -INFINITY;
            }
        }
    }
"""


def body(narrow: bool) -> str:
    """The body for rows that are bfloat16 numbers once unpacked, or for those of float32."""
    keep, copy = (_KEEP_BF16, _COPY_BF16) if narrow else (_KEEP_FLOAT, "")
    return _BEGIN + keep + _SCORE.replace("COPY", copy)
