"""16 x 16 tiles of a matrix product, kept by a SIMD-group: how each target multiplies them.

The bfloat16 tiles are Metal's SIMD-group matrices, or CUDA's tensor cores (mma.sync on tiles that
ldmatrix reads); PRODUCTS are plain arithmetic, for float32 activations. A and B lie in threadgroup
memory as rows of LD elements, or as many as is said, both along the summed axis.
"""

from ds4mlx.custom_kernels.words import LOAD8

METAL_BF16 = """
#include <metal_simdgroup_matrix>
typedef bfloat16_t element;
struct TileA { simdgroup_matrix<bfloat16_t, 8, 8> m[2][2]; };
typedef TileA TileB;
struct TileC { simdgroup_matrix<float, 8, 8> m[2][2]; };
inline void zero(thread TileC& c) {
  for (int i = 0; i < 4; i++) c.m[i / 2][i % 2] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
inline void load_a(thread TileA& a, const threadgroup bfloat16_t* p, uint, uint ld) {
  for (int i = 0; i < 4; i++)
    simdgroup_load(a.m[i / 2][i % 2], p + i / 2 * 8 * ld + i % 2 * 8, ld);
}
inline void load_b(thread TileB& b, const threadgroup bfloat16_t* p, uint, uint ld) {
  for (int i = 0; i < 4; i++)
    simdgroup_load(b.m[i / 2][i % 2], p + i % 2 * 8 * ld + i / 2 * 8, ld, ulong2(0, 0), true);
}
inline void mma(thread TileC& c, thread TileA& a, thread TileB& b, uint) {
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 2; k++)
      simdgroup_multiply_accumulate(c.m[i / 2][i % 2], a.m[i / 2][k], b.m[k][i % 2],
                                    c.m[i / 2][i % 2]);
}
inline void store(thread TileC& c, threadgroup float* p, uint, uint ld = 16) {
  for (int i = 0; i < 4; i++) simdgroup_store(c.m[i / 2][i % 2], p + i / 2 * 8 * ld + i % 2 * 8, ld);
}
inline void copy8(threadgroup bfloat16_t* to, const device bfloat16_t* from) {
  *(threadgroup uint4*)to = *(const device uint4*)from;
}
inline void copied() {}
"""

CUDA_BF16 = """
typedef bfloat16_t element;
struct TileA { uint r[4]; };
typedef TileA TileB;
struct TileC { float v[8]; };
inline void zero(TileC& c) { for (int i = 0; i < 8; i++) c.v[i] = 0; }
// Four 8 x 8 corners: upper left, lower left, upper right, lower right.
inline void load_a(TileA& a, const bfloat16_t* p, uint lane, uint ld) {
  uint at = (uint)__cvta_generic_to_shared(p + lane % 16 * ld + lane / 16 * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.r[0]), "=r"(a.r[1]), "=r"(a.r[2]), "=r"(a.r[3]) : "r"(at) : "memory");
}
inline void load_b(TileB& b, const bfloat16_t* p, uint lane, uint ld) {
  load_a(b, p, lane, ld);
}
inline void mma8(float* c, const TileA& a, uint b0, uint b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
}
inline void mma(TileC& c, TileA& a, TileB& b, uint) {
  mma8(c.v, a, b.r[0], b.r[2]);
  mma8(c.v + 4, a, b.r[1], b.r[3]);
}
inline void store(TileC& c, float* p, uint lane, uint ld = 16) {
  for (int i = 0; i < 8; i++)
    p[(lane / 4 + i / 2 % 2 * 8) * ld + i / 4 * 8 + lane % 4 * 2 + i % 2] = c.v[i];
}
// Past the registers, while the weight is decoded.
inline void copy8(bfloat16_t* to, const bfloat16_t* from) {
  uint at = (uint)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(at), "l"(from) : "memory");
}
inline void copied() { asm volatile("cp.async.wait_all;" : : : "memory"); }
"""

# Eight numbers of a row, as 16-byte words.
BF16 = """
inline void put8(threadgroup bfloat16_t* p, const thread float* v) {
  uint4 w;
  w.x = two_bf16(v[0], v[1]); w.y = two_bf16(v[2], v[3]);
  w.z = two_bf16(v[4], v[5]); w.w = two_bf16(v[6], v[7]);
  *(threadgroup uint4*)p = w;
}
"""

FLOAT = (
    LOAD8
    + """
inline void put8(threadgroup float* p, const thread float* v) {
  for (int i = 0; i < 8; i++) p[i] = v[i];
}
"""
)

PRODUCTS = """
#define DEEP 32
#define LD 36
struct TileA { const threadgroup float* p; };
typedef TileA TileB;
struct TileC { float v[8]; };
inline void zero(thread TileC& c) { for (int i = 0; i < 8; i++) c.v[i] = 0; }
inline void load_a(thread TileA& a, const threadgroup float* p, uint) { a.p = p; }
inline void load_b(thread TileB& b, const threadgroup float* p, uint) { b.p = p; }
inline void mma(thread TileC& c, thread TileA& a, thread TileB& b, uint lane) {
  const threadgroup float* row = a.p + lane / 2 * LD;
  for (uint i = 0; i < 8; i++) {
    const threadgroup float* column = b.p + (lane % 2 * 8 + i) * LD;
    for (int k = 0; k < 16; k++) c.v[i] = fma(row[k], column[k], c.v[i]);
  }
}
inline void copy8(threadgroup float* to, const device float* from) {
  float v[8];
  load8(from, v);
  put8(to, v);
}
"""
