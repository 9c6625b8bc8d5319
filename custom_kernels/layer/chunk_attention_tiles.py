"""The tiles that the core attention of many tokens multiplies: of queries, rows, scores and sums.

In bfloat16 they are those of the matrix units, on Metal and on CUDA; in float32 a lane has a few
elements of each.
"""

from ds4mlx.custom_kernels.products import tiles

# Rows as they are read by products with weights; a tile's rows times factors; queries.
METAL_BF16 = (
    tiles.METAL_BF16
    + """
#define STEP 16
#define QUERIES 0
#define PAD 8
#define LDQ WIDTH
#define stage(...)
#define ROW_AT(r, code) ((code) & 1 ? (const device uint*)rows + uint(code) / 2 * WORDS \\
                                    : (const device uint*)window + uint(code) / 2 * WORDS)
typedef TileA TileQ;
typedef TileC TileS;
#define mma_scores mma
#define mma_values mma
inline void load_q(thread TileA& a, const device bfloat16_t* p, uint, uint ld) {
  for (int i = 0; i < 4; i++)
    simdgroup_load(a.m[i / 2][i % 2], p + i / 2 * 8 * ld + i % 2 * 8, ld);
}
inline void load_v(thread TileB& b, const threadgroup bfloat16_t* p, uint, uint ld) {
  for (int i = 0; i < 4; i++)
    simdgroup_load(b.m[i / 2][i % 2], p + i / 2 * 8 * ld + i % 2 * 8, ld);
}
inline void scale_rows(thread TileC& c, const threadgroup float* f, uint lane) {
  uint row = (lane / 4 & 4) + lane / 2 % 4;
  for (int i = 0; i < 4; i++) c.m[i / 2][i % 2].thread_elements() *= f[row + i / 2 * 8];
}
inline void store_scores(thread TileC& c, threadgroup float* p, uint lane, uint ld) {
  store(c, p, lane, ld);
}
"""
)
CUDA_BF16 = (
    tiles.CUDA_BF16
    + """
#define STEP 16
#define QUERIES 1
#define PAD 8
#define LDQ LDK
#define ROW_AT(r, code) (staged + (r) * WORDS)
typedef TileA TileQ;
typedef TileC TileS;
#define mma_scores mma
#define mma_values mma
#define load_q load_a
#define store_scores store
// As of load_b, of rows that lie across the summed axis.
inline void load_v(TileB& b, const bfloat16_t* p, uint lane, uint ld) {
  uint at = (uint)__cvta_generic_to_shared(p + lane % 16 * ld + lane / 16 * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b.r[0]), "=r"(b.r[2]), "=r"(b.r[1]), "=r"(b.r[3]) : "r"(at) : "memory");
}
inline void scale_rows(TileC& c, const float* f, uint lane) {
  for (int i = 0; i < 8; i++) c.v[i] *= f[lane / 4 + i / 2 % 2 * 8];
}
#define stage(words, block, ...) stage_rows<words, block>(__VA_ARGS__)
// Copies the rows of a block, as they lie, while something else is computed.
template <int WORDS, int BLOCK>
inline void stage_rows(uint* staged, const int* lies, const void* window, const void* rows, uint id) {
  const int BYTES = WORDS % 4 == 0 ? 16 : WORDS % 2 == 0 ? 8 : 4, EACH = 4 * WORDS / BYTES;
  for (int i = id; i < BLOCK * EACH; i += 256) {
    int code = lies[i / EACH];
    if (code < 0) continue;
    const uint* row = (const uint*)(code & 1 ? rows : window) + uint(code) / 2 * WORDS;
    uint to = (uint)__cvta_generic_to_shared(staged + i / EACH * WORDS + i % EACH * (BYTES / 4));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                 : : "r"(to), "l"(row + i % EACH * (BYTES / 4)), "n"(BYTES) : "memory");
  }
}
"""
)
BF16 = (
    tiles.BF16
    + """
inline void put_out(device bfloat16_t* p, const thread float* v) {
  uint4 w;
  w.x = two_bf16(v[0], v[1]); w.y = two_bf16(v[2], v[3]);
  w.z = two_bf16(v[4], v[5]); w.w = two_bf16(v[6], v[7]);
  *(device uint4*)p = w;
}
"""
)
FLOAT = """
typedef float element;
#define STEP 8
#define QUERIES 0
#define PAD 4
#define LDQ WIDTH
#define stage(...)
#define copied()
#define ROW_AT(r, code) ((code) & 1 ? (const device uint*)rows + uint(code) / 2 * WORDS \\
                                    : (const device uint*)window + uint(code) / 2 * WORDS)
struct TileQ { const device float* p; uint ld; };
struct TileB { const threadgroup float* p; uint ld; };
typedef TileB TileA;
struct TileS { float v[4]; };
struct TileC { float v[8]; };
inline void zero(thread TileS& c) { for (int i = 0; i < 4; i++) c.v[i] = 0; }
inline void zero(thread TileC& c) { for (int i = 0; i < 8; i++) c.v[i] = 0; }
inline void load_q(thread TileQ& a, const device float* p, uint, uint ld) { a.p = p; a.ld = ld; }
inline void load_b(thread TileB& b, const threadgroup float* p, uint, uint ld) { b.p = p; b.ld = ld; }
#define load_a load_b
#define load_v load_b
inline void mma_scores(thread TileS& c, TileQ a, TileB b, uint lane) {
  const device float* row = a.p + lane / 2 * a.ld;
  for (uint i = 0; i < 4; i++) {
    const threadgroup float* other = b.p + (lane % 2 * 4 + i) * b.ld;
    for (uint k = 0; k < 16; k++) c.v[i] = fma(row[k], other[k], c.v[i]);
  }
}
inline void mma_values(thread TileC& c, TileA a, TileB b, uint lane) {
  const threadgroup float* row = a.p + lane / 2 * a.ld;
  for (uint k = 0; k < 8; k++) {
    const threadgroup float* other = b.p + k * b.ld + lane % 2 * 8;
    for (uint i = 0; i < 8; i++) c.v[i] = fma(row[k], other[i], c.v[i]);
  }
}
inline void scale_rows(thread TileC& c, const threadgroup float* f, uint lane) {
  for (uint i = 0; i < 8; i++) c.v[i] *= f[lane / 2];
}
inline void store_scores(thread TileS& c, threadgroup float* p, uint lane, uint ld) {
  for (uint i = 0; i < 4; i++) p[lane / 2 * ld + lane % 2 * 4 + i] = c.v[i];
}
inline void store(thread TileC& c, threadgroup float* p, uint lane, uint ld = 16) {
  for (uint i = 0; i < 8; i++) p[lane / 2 * ld + lane % 2 * 8 + i] = c.v[i];
}
inline void put_out(device float* p, thread const float* v) { put4(p, v); put4(p + 4, v + 4); }
"""
