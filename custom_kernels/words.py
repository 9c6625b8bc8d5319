"""The words of the dialect beyond Metal's own: what each target is given before a kernel's text.

METAL and CUDA give both targets the same functions; CUDA also gives Metal's words.
"""

# BANKS: so many copies of a table of 16-byte words, side by side and each read by the lanes of one number
# modulo BANKS, spare lanes that read different words the wait for each other.
METAL = """
#define BANKS 1
inline half2 as_half2(uint w) { return as_type<half2>(w); }
inline uint as_uint(half2 v) { return as_type<uint>(v); }
inline half2 fill2(float v) { return half2(half(v)); }
inline half2 pair2(float a, float b) { return half2(half(a), half(b)); }
inline half2 mad2(half2 a, half2 b, half2 c) { return fma(a, b, c); }
inline uint two_bf16(float a, float b) {
  return uint(as_type<ushort>(static_cast<bfloat16_t>(a))) |
         uint(as_type<ushort>(static_cast<bfloat16_t>(b))) << 16;
}
inline float low(half2 v) { return float(v.x); }
inline float high(half2 v) { return float(v.y); }
inline int dot4(uint a, uint b, int c) {
  char4 x = as_type<char4>(a), y = as_type<char4>(b);
  return c + int(x.x) * int(y.x) + int(x.y) * int(y.y) + int(x.z) * int(y.z) + int(x.w) * int(y.w);
}
"""

CUDA = """
#define BANKS 8
#define device
#define constant
#define thread
#define threadgroup
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define thread_index_in_threadgroup threadIdx.x
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define threadgroup_barrier(flags) __syncthreads()
#define simdgroup_barrier(flags) __syncwarp()
#define INFINITY __int_as_float(0x7f800000)
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;
template <typename T, typename U> inline T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "another size");
  T t;
  memcpy(&t, &u, sizeof(T));
  return t;
}
template <typename T> inline T simd_sum(T v) {
  for (int i = 1; i < 32; i *= 2) v += __shfl_xor_sync(~0u, v, i);
  return v;
}
template <typename T> inline T simd_max(T v) {
  for (int i = 1; i < 32; i *= 2) v = max(v, __shfl_xor_sync(~0u, v, i));
  return v;
}
template <typename T> inline T simd_min(T v) {
  for (int i = 1; i < 32; i *= 2) v = min(v, __shfl_xor_sync(~0u, v, i));
  return v;
}
#if __CUDA_ARCH__ >= 800
inline uint simd_max(uint v) { return __reduce_max_sync(~0u, v); }
inline uint simd_min(uint v) { return __reduce_min_sync(~0u, v); }
#endif
template <typename T> inline T simd_shuffle(T v, ushort i) { return __shfl_sync(~0u, v, i); }
template <typename T> inline T simd_shuffle_xor(T v, ushort i) {
  return __shfl_xor_sync(~0u, v, i);
}
inline half2 as_half2(uint w) { return as_type<half2>(w); }
inline uint as_uint(half2 v) { return as_type<uint>(v); }
inline half2 fill2(float v) { return __float2half2_rn(v); }
inline half2 pair2(float a, float b) { return __floats2half2_rn(a, b); }
inline half2 mad2(half2 a, half2 b, half2 c) { return __hfma2(a, b, c); }
inline uint two_bf16(float a, float b) {
  __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return as_type<uint>(v);
}
inline float low(half2 v) { return __low2float(v); }
inline float high(half2 v) { return __high2float(v); }
inline int dot4(uint a, uint b, int c) { return __dp4a(int(a), int(b), c); }
"""

# Eight activations of any type, by 16-byte loads.
LOAD8 = """
inline void load8(const device float* p, thread float* v) {
  for (int i = 0; i < 2; i++) {
    float4 q = ((const device float4*)p)[i];
    v[4 * i] = q.x; v[4 * i + 1] = q.y; v[4 * i + 2] = q.z; v[4 * i + 3] = q.w;
  }
}
inline void two(uint w, thread float* v) {
  v[0] = as_type<float>(w << 16); v[1] = as_type<float>(w & 0xffff0000u);
}
inline void load8(const device bfloat16_t* p, thread float* v) {
  uint4 q = *(const device uint4*)p;
  two(q.x, v); two(q.y, v + 2); two(q.z, v + 4); two(q.w, v + 6);
}
inline void two_halves(uint w, thread float* v) {
  v[0] = low(as_half2(w)); v[1] = high(as_half2(w));
}
inline void load8(const device float16_t* p, thread float* v) {
  uint4 q = *(const device uint4*)p;
  two_halves(q.x, v); two_halves(q.y, v + 2); two_halves(q.z, v + 4); two_halves(q.w, v + 6);
}
"""

# Counters in threadgroup memory, which all its threads may raise at once.
METAL_COUNTERS = """
inline void clear(threadgroup atomic_uint* p) { atomic_store_explicit(p, 0u, memory_order_relaxed); }
inline void count_one(threadgroup atomic_uint* p) {
  atomic_fetch_add_explicit(p, 1u, memory_order_relaxed);
}
inline uint counted(const threadgroup atomic_uint* p) {
  return atomic_load_explicit(p, memory_order_relaxed);
}
"""
CUDA_COUNTERS = """
typedef uint atomic_uint;
inline void clear(atomic_uint* p) { *p = 0; }
inline void count_one(atomic_uint* p) { atomicAdd(p, 1u); }
inline uint counted(const atomic_uint* p) { return *p; }
"""
