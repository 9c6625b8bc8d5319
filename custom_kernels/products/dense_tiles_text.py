"""The text of dense_matvec on matrix units: 16 rows of a matrix by up to 8 rows of activations.

Lane l has columns 8 (l % 4) .. + 7 of each block of 32, of the rows l / 4 and l / 4 + 8 of the matrix
and of row l / 4 of the activations, all as bfloat16, which has room for every code. A block's product is
float32, and is multiplied by the block's scale then.
"""

# c += the product of 16 x 16 by 16 x 8: pairs of a lane's two rows, and of its row of activations.
CUDA = """
inline void multiply(float* c, const uint* a, const uint* b, const uint* x, uint) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(b[0]), "r"(a[1]), "r"(b[1]), "r"(x[0]), "r"(x[1]));
}
"""
METAL = """
inline float dot2(uint a, uint b) {
  return fma(as_type<float>(a << 16), as_type<float>(b << 16),
             as_type<float>(a & 0xffff0000u) * as_type<float>(b & 0xffff0000u));
}
inline void multiply(thread float* c, const thread uint* a, const thread uint* b,
                     const thread uint* x, uint lane) {
  for (uint k = 0; k < 4; k++) {
    for (uint i = 0; i < 2; i++) {
      ushort row = ushort(lane / 4 * 4 + k), token = ushort(lane % 4 * 8 + k);
      uint upper = simd_shuffle(a[i], row), lower = simd_shuffle(b[i], row);
      uint x0 = simd_shuffle(x[i], token), x1 = simd_shuffle(x[i], ushort(token + 4));
      c[0] += dot2(upper, x0); c[1] += dot2(upper, x1);
      c[2] += dot2(lower, x0); c[3] += dot2(lower, x1);
    }
  }
}
"""

# Eight codes of a row, and the scales of four blocks.
FORMATS = {
    "mxfp8": """
inline uint4 eight(Mxfp8 w, uint row, uint c, uint all) {
  uint2 v = ((const device uint2*)w.weight)[row * (all / 8) + c];
  return uint4{v.x, v.y, 0, 0};
}
inline void four_scales(Mxfp8 w, uint row, uint c, uint all, thread float* s) {
  uint v = ((const device uint*)w.scales)[row * (all / 128) + c];
  #pragma unroll
  for (int u = 0; u < 4; u++) s[u] = 256.0f * power_or_nan((v >> (8 * u)) & 255u);
}
""",
    "q8_0": """
inline uint4 eight(Q80 w, uint row, uint c, uint all) {
  uint2 v = ((const device uint2*)w.weight)[row * (all / 8) + c];
  return uint4{v.x, v.y, 0, 0};
}
inline void four_scales(Q80 w, uint row, uint c, uint all, thread float* s) {
  uint2 v = ((const device uint2*)w.d)[row * (all / 128) + c];
  two_halves(v.x, s); two_halves(v.y, s + 2);
}
""",
    "bf16": """
inline uint4 eight(Bf16 w, uint row, uint c, uint all) { return w.load(row, c, all); }
inline void four_scales(Bf16, uint, uint, uint, thread float* s) {
  s[0] = s[1] = s[2] = s[3] = 1.0f;
}
""",
}

# Threadgroup's product of 16 rows: SUBS SIMD-groups take turns at 128 columns, and add up.
PRODUCT = """
struct Chunk { uint4 codes[2][4], x[4]; float scale[2][4]; };
// Of numbers that bfloat16 has room for.
inline uint pair_of(float a, float b) {
  return (as_type<uint>(a) >> 16) | (as_type<uint>(b) & 0xffff0000u);
}
template <typename F>
inline void fetch(thread Chunk& k, F w, const device bfloat16_t* x, uint upper, uint lower, uint c,
                  uint all, uint q) {
  #pragma unroll
  for (uint u = 0; u < 4; u++) {
    k.x[u] = ((const device uint4*)x)[16 * c + 4 * u];
    k.codes[0][u] = eight(w, upper, 16 * c + 4 * u + q, all);
    k.codes[1][u] = eight(w, lower, 16 * c + 4 * u + q, all);
  }
  four_scales(w, upper, c, all, k.scale[0]);
  four_scales(w, lower, c, all, k.scale[1]);
}
template <typename F, int SUBS, typename O>
inline void tile(F w, const device bfloat16_t* x, uint stride, uint tokens, device O* out, uint out_stride,
                 uint row0, uint rows, uint all, threadgroup float* sums, uint sub, uint lane) {
  uint g = lane / 4, q = lane % 4, upper = min(row0 + g, rows - 1), lower = min(row0 + g + 8, rows - 1);
  const device bfloat16_t* own = x + min(g, tokens - 1) * stride + 8 * q;
  float y[4] = {0, 0, 0, 0};
  uint chunks = all / 128;
  Chunk k;
  if (sub < chunks) fetch(k, w, own, upper, lower, sub, all, q);
  for (uint c = sub; c < chunks; c += SUBS) {
    Chunk next = k;
    if (c + SUBS < chunks) fetch(next, w, own, upper, lower, c + SUBS, all, q);
    #pragma unroll
    for (int u = 0; u < 4; u++) {
      float block[4] = {0, 0, 0, 0};
      #pragma unroll
      for (int i = 0; i < 2; i++) {
        float v[4];
        uint a[2], b[2], at[2];
        F::quad(k.codes[0][u], i, v);
        a[0] = pair_of(v[0], v[1]); a[1] = pair_of(v[2], v[3]);
        F::quad(k.codes[1][u], i, v);
        b[0] = pair_of(v[0], v[1]); b[1] = pair_of(v[2], v[3]);
        at[0] = word(k.x[u], 2 * i); at[1] = word(k.x[u], 2 * i + 1);
        multiply(block, a, b, at, lane);
      }
      #pragma unroll
      for (int i = 0; i < 4; i++) y[i] += k.scale[i / 2][u] * block[i];
    }
    k = next;
  }
  #pragma unroll
  for (uint i = 0; i < 4; i++) sums[sub * 128 + 4 * lane + i] = y[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint at = 32 * sub + lane, from = at / 4, row = row0 + from / 4 + at % 4 / 2 * 8;
  uint token = from % 4 * 2 + at % 2;
  if (at >= 128 || row >= rows || token >= tokens) return;
  float sum = 0;
  #pragma unroll
  for (uint s = 0; s < SUBS; s++) sum += sums[s * 128 + at];
  out[token * out_stride + row] = static_cast<O>(sum);
}
"""
