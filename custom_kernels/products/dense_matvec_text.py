"""The text of dense_matvec: how a lane loads 16 bytes of a row, in each format, and multiplies.

A piece is 16 bytes of a row of weights: its columns are those that share a lane's load.
"""

# Goes after LOAD8 of `words`.
LOAD4 = """
inline void load4(const device float* p, thread float* v) {
  float4 q = *(const device float4*)p;
  v[0] = q.x; v[1] = q.y; v[2] = q.z; v[3] = q.w;
}
inline void load4(const device bfloat16_t* p, thread float* v) {
  uint2 q = *(const device uint2*)p;
  two(q.x, v); two(q.y, v + 2);
}
// Rows of activations, `stride` elements apart, four or eight columns at a time; a row past the last is
// that.
template <typename T> struct Rows {
  const device T* first; uint stride, last;
  inline void quad(uint t, uint i, thread float* v) const {
    load4(first + min(t, last) * stride + 4 * i, v);
  }
  inline void eight(uint t, uint i, thread float* v) const {
    load8(first + min(t, last) * stride + 8 * i, v);
  }
};
inline uint word(uint4 w, int i) { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; }
// A scale of MXFP8: a power of two, or NaN.
inline float power_or_nan(uint e) {
  return as_type<float>(e == 0 || e == 255u ? e << 23 | 0x00400000u : e << 23);
}
"""


# A format: columns of a piece, how it is loaded, its scale, and the i-th four of its values.
FORMATS = {
    "mxfp8": """
struct Mxfp8 {
  enum { COLUMNS = 16 };
  const device uint* weight; const device uchar* scales;
  inline uint4 load(uint row, uint c, uint all) const {
    return ((const device uint4*)weight)[row * (all / 16) + c];
  }
  // A code's bits put where a half has them give its value times 2 to the power -8.
  inline float scale(uint row, uint c, uint all) const {
    return 256.0f * power_or_nan(scales[row * (all / 32) + c / 2]);
  }
  static inline void quad(uint4 p, int i, thread float* v) {
    uint w = word(p, i);
    half2 even = as_half2(((w << 8) & 0x80008000u) | ((w << 7) & 0x3f803f80u));
    half2 odd = as_half2((w & 0x80008000u) | ((w >> 1) & 0x3f803f80u));
    v[0] = low(even); v[1] = low(odd); v[2] = high(even); v[3] = high(odd);
  }
};
""",
    "q8_0": """
struct Q80 {
  enum { COLUMNS = 16 };
  const device int8_t* weight; const device float16_t* d;
  inline uint4 load(uint row, uint c, uint all) const {
    return ((const device uint4*)weight)[row * (all / 16) + c];
  }
  inline float scale(uint row, uint c, uint all) const {
    return float(d[row * (all / 32) + c / 2]);
  }
  // 1024 + 128 + code, exact in a half.
  static inline half2 codes(uint w) {
    return mad2(as_half2((w & 0x00ff00ffu) | 0x64006400u), fill2(1.0f), fill2(-1152.0f));
  }
  static inline void quad(uint4 p, int i, thread float* v) {
    uint w = word(p, i) ^ 0x80808080u;
    half2 even = codes(w), odd = codes(w >> 8);
    v[0] = low(even); v[1] = low(odd); v[2] = high(even); v[3] = high(odd);
  }
};
""",
    "bf16": """
struct Bf16 {
  enum { COLUMNS = 8 };
  const device bfloat16_t* weight;
  inline uint4 load(uint row, uint c, uint all) const {
    return ((const device uint4*)weight)[row * (all / 8) + c];
  }
  inline float scale(uint, uint, uint) const { return 1.0f; }
  static inline void quad(uint4 p, int i, thread float* v) {
    two(word(p, 2 * i), v); two(word(p, 2 * i + 1), v + 2);
  }
};
""",
    "f16": """
struct F16 {
  enum { COLUMNS = 8 };
  const device float16_t* weight;
  inline uint4 load(uint row, uint c, uint all) const {
    return ((const device uint4*)weight)[row * (all / 8) + c];
  }
  inline float scale(uint, uint, uint) const { return 1.0f; }
  static inline void quad(uint4 p, int i, thread float* v) {
    two_halves(word(p, 2 * i), v); two_halves(word(p, 2 * i + 1), v + 2);
  }
};
""",
    "f32": """
struct F32 {
  enum { COLUMNS = 4 };
  const device float* weight;
  inline uint4 load(uint row, uint c, uint all) const {
    return ((const device uint4*)weight)[row * (all / 4) + c];
  }
  inline float scale(uint, uint, uint) const { return 1.0f; }
  static inline void quad(uint4 p, int, thread float* v) {
    for (int i = 0; i < 4; i++) v[i] = as_type<float>(word(p, i));
  }
};
""",
}

STRUCTS = {"mxfp8": "Mxfp8", "q8_0": "Q80", "bf16": "Bf16", "f16": "F16", "f32": "F32"}
COLUMNS = {"mxfp8": 16, "q8_0": 16, "bf16": 8, "f16": 8, "f32": 4}  # of a piece

# Rows row0 .. row0 + R - 1 of a matrix times N rows of x.
PRODUCT = """
// The sums over all lanes of M values, a power of two: lane l < M gets that of value `which`.
template <int M>
inline float totals(thread float* v, uint lane, thread uint& which) {
  // Bounds that do not change from step to step, so that `v` stays in registers.
  #pragma unroll
  for (int s = 0; s < 5; s++) {
    int m = M >> (s + 1);
    bool upper = ((lane >> s) & 1u) != 0;
    which += upper ? uint(m) : 0u;
    #pragma unroll
    for (int i = 0; i < M / 2; i++) {
      if (i < m) {
        float mine = upper ? v[i + m] : v[i], other = upper ? v[i] : v[i + m];
        v[i] = mine + simd_shuffle_xor(other, 1u << s);
      }
    }
  }
  float sum = v[0];
  #pragma unroll
  for (uint b = M; b < 32; b *= 2) sum += simd_shuffle_xor(sum, b);
  return sum;
}
// What a lane loads at a time: U pieces of each of R rows.
template <int R, int U> struct Pieces { uint4 codes[U][R]; float scale[U][R]; };
template <typename F, int R, int U>
inline void fetch(thread Pieces<R, U>& k, F w, uint row0, uint rows, uint all, uint c0) {
  uint last = all / F::COLUMNS - 1;
  #pragma unroll
  for (int u = 0; u < U; u++) {
    #pragma unroll
    for (int r = 0; r < R; r++) {
      uint row = min(row0 + r, rows - 1), c = min(c0 + 32 * u, last);
      k.codes[u][r] = w.load(row, c, all);
      k.scale[u][r] = c0 + 32 * u <= last ? w.scale(row, c, all) : 0.0f;
    }
  }
}
// y += products of a lane's pieces, the first of which is number c0 of a row.
template <typename F, int R, int N, int U, typename X>
inline void multiply(const thread Pieces<R, U>& k, X x, thread float* y, uint c0, uint all) {
  // Lanes meet fewer lines of memory with 16 bytes of activations at a time than with 8.
  enum { TAKEN = F::COLUMNS < 8 ? 4 : 8 };
  uint last = all / F::COLUMNS - 1;
  #pragma unroll
  for (int u = 0; u < U; u++) {
    uint first = min(c0 + 32 * u, last) * (F::COLUMNS / TAKEN);
    float sum[R][N];
    #pragma unroll
    for (int q = 0; q < F::COLUMNS / TAKEN; q++) {
      float v[R][TAKEN];
      #pragma unroll
      for (int r = 0; r < R; r++) {
        #pragma unroll
        for (int i = 0; i < TAKEN / 4; i++)
          F::quad(k.codes[u][r], q * (TAKEN / 4) + i, v[r] + 4 * i);
      }
      #pragma unroll
      for (int t = 0; t < N; t++) {
        float a[8];
        if (TAKEN == 8) x.eight(t, first + q, a);
        else x.quad(t, first + q, a);
        #pragma unroll
        for (int r = 0; r < R; r++) {
          float s = q ? sum[r][t] : 0.0f;
          #pragma unroll
          for (int i = 0; i < TAKEN; i++) s = fma(v[r][i], a[i], s);
          sum[r][t] = s;
        }
      }
    }
    // A piece past the end counts nothing, also where its product is no number.
    #pragma unroll
    for (int r = 0; r < R; r++) {
      #pragma unroll
      for (int t = 0; t < N; t++)
        y[r * N + t] += c0 + 32 * u <= last ? k.scale[u][r] * sum[r][t] : 0.0f;
    }
  }
}
// y += products of all of a lane's pieces from number c0 of a row on; SPLIT SIMD-groups share a row.
template <typename F, int R, int N, int U, int SPLIT = 1, typename X>
inline void multiply_from(F w, X x, thread float* y, uint row0, uint rows, uint all, uint c0) {
  for (; c0 < all / F::COLUMNS; c0 += 32 * U * SPLIT) {
    Pieces<R, U> k;
    fetch(k, w, row0, rows, all, c0);
    multiply<F, R, N, U>(k, x, y, c0, all);
  }
}
// What SPLIT SIMD-groups have of the same M sums goes to the first of them.
template <int SPLIT, int M>
inline void gather(thread float* y, threadgroup float* parts, uint sub, uint lane) {
  #pragma unroll
  for (uint i = 0; i < M; i++) parts[(sub * M + i) * 32 + lane] = y[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  #pragma unroll
  for (uint s = 1; s < SPLIT; s++) {
    #pragma unroll
    for (uint i = 0; i < M; i++)
      if (sub % SPLIT == 0) y[i] += parts[((sub + s) * M + i) * 32 + lane];
  }
}
// Sums over the lanes, each to its place.
template <int R, int N, int M, typename O>
inline void put(thread float* y, uint tokens, device O* out, uint out_stride, uint row0, uint rows,
                uint lane) {
  uint which = 0;
  float total = totals<M>(y, lane, which);
  uint r = which / N, t = which % N;
  if (lane < M && r < R && t < tokens && row0 + r < rows)
    out[t * out_stride + row0 + r] = static_cast<O>(total);
}
"""
