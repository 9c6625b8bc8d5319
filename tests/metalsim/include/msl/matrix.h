// Atomics, which need no lock here, and 8 x 8 matrices spread over a SIMD-group.
#pragma once

namespace metal {
// ---------------------------------------------------------------- atomics
enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};
template <typename T>
struct _atomic {
  T v;
};
template <typename T>
using atomic = _atomic<T>;
#define MSL_ATOMIC_RMW(AS, name, expr)                                                \
  template <typename T>                                                               \
  MSL_RT T atomic_fetch_##name##_explicit(volatile AS _atomic<T>* p, decltype(T()) x, \
                                          memory_order) {                             \
    T o = p->v;                                                                       \
    p->v = (T)(expr);                                                                 \
    return o;                                                                         \
  }
#define MSL_ATOMIC(AS)                                                                             \
  MSL_ATOMIC_RMW(AS, add, o + x)                                                                   \
  MSL_ATOMIC_RMW(AS, sub, o - x) MSL_ATOMIC_RMW(AS, and, o& x) MSL_ATOMIC_RMW(AS, or, o | x)       \
      MSL_ATOMIC_RMW(AS, xor, o ^ x) MSL_ATOMIC_RMW(AS, min, x < o ? x : o)                        \
          MSL_ATOMIC_RMW(AS, max, o < x ? x : o) template <typename T>                             \
          MSL_RT T atomic_load_explicit(const volatile AS _atomic<T>* p, memory_order) {           \
    return p->v;                                                                                   \
  }                                                                                                \
  template <typename T>                                                                            \
  MSL_RT void atomic_store_explicit(volatile AS _atomic<T>* p, decltype(T()) x, memory_order) {    \
    p->v = x;                                                                                      \
  }                                                                                                \
  template <typename T>                                                                            \
  MSL_RT T atomic_exchange_explicit(volatile AS _atomic<T>* p, decltype(T()) x, memory_order) {    \
    T o = p->v;                                                                                    \
    p->v = x;                                                                                      \
    return o;                                                                                      \
  }                                                                                                \
  template <typename T>                                                                            \
  MSL_RT bool atomic_compare_exchange_weak_explicit(volatile AS _atomic<T>* p, thread T* e,        \
                                                    decltype(T()) x, memory_order, memory_order) { \
    if (p->v == *e) {                                                                              \
      p->v = x;                                                                                    \
      return true;                                                                                 \
    }                                                                                              \
    *e = p->v;                                                                                     \
    return false;                                                                                  \
  }
MSL_ATOMIC(device)
#ifdef MSL_STRICT
MSL_ATOMIC(threadgroup)
#endif

// ------------------------------------------------------- simdgroup matrices
// Lane l holds (row, col) and (row, col + 1); the layout is the one MLX's steel
// kernels rely on through thread_elements(). MSL itself does not promise it.
template <typename T, int C = 8, int R = 8>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "only 8x8");
  vec<T, 2> e;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T v) : e(v) {}
  thread vec<T, 2>& thread_elements() { return e; }
  const thread vec<T, 2>& thread_elements() const { return e; }
  static MSL_RT int row(uint l) { return (l / 4 & 4) + (l / 2) % 4; }
  static MSL_RT int col(uint l) { return (l / 4 & 2) * 2 + (l % 2) * 2; }
};
template <typename T, int C = 8, int R = C>
MSL_RT simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
  return simdgroup_matrix<T, C, R>(v);
}
#define MSL_SGMEM(AS)                                                                          \
  template <typename T>                                                                        \
  MSL_OP void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, const AS T* p, ulong ld = 8, \
                             ulong2 o = ulong2(0, 0), bool t = false) {                        \
    uint l = msl_lane();                                                                       \
    int r = d.row(l), c = d.col(l);                                                            \
    p += o.y * ld + o.x;                                                                       \
    for (int i = 0; i < 2; i++) d.e[i] = t ? p[(c + i) * ld + r] : p[r * ld + c + i];          \
  }                                                                                            \
  template <typename T>                                                                        \
  MSL_OP void simdgroup_store(simdgroup_matrix<T, 8, 8> d, AS T* p, ulong ld = 8,              \
                              ulong2 o = ulong2(0, 0), bool t = false) {                       \
    uint l = msl_lane();                                                                       \
    int r = d.row(l), c = d.col(l);                                                            \
    p += o.y * ld + o.x;                                                                       \
    for (int i = 0; i < 2; i++) {                                                              \
      if (t) p[(c + i) * ld + r] = d.e[i];                                                     \
      else p[r * ld + c + i] = d.e[i];                                                         \
    }                                                                                          \
  }
MSL_SGMEM(device)
#ifdef MSL_STRICT
MSL_SGMEM(threadgroup)
#endif
template <typename D, typename A, typename B, typename C>
MSL_RT void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                          simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
                                          simdgroup_matrix<C, 8, 8> c, MSL_LINE) {
  struct AB {
    vec<A, 2> a;
    vec<B, 2> b;
  };
  _meet<AB> m(AB{a.e, b.e}, 40, line);
  if (m.m.mask != ~0u) msl_undefined(line, "simdgroup_multiply_accumulate without all 32 lanes");
  float sa[64], sb[64];
  for (uint l = 0; l < 32; l++) {
    AB x = m.at(l);
    int r = a.row(l), k = a.col(l);
    for (int i = 0; i < 2; i++) {
      sa[r * 8 + k + i] = (float)x.a[i];
      sb[r * 8 + k + i] = (float)x.b[i];
    }
  }
  int r = d.row(msl_lane()), k = d.col(msl_lane());
  for (int i = 0; i < 2; i++) {
    float s = (float)c.e[i];
    for (int j = 0; j < 8; j++) s += sa[r * 8 + j] * sb[j * 8 + k + i];
    d.e[i] = (D)s;
  }
}
template <typename D, typename A, typename B>
MSL_RT void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                               simdgroup_matrix<B, 8, 8> b, MSL_LINE) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<D, 8, 8>((D)0), line);
}
}  // namespace metal
typedef metal::simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef metal::simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef metal::simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
typedef metal::_atomic<int> atomic_int;
typedef metal::_atomic<uint> atomic_uint;
typedef metal::_atomic<float> atomic_float;
typedef metal::_atomic<bool> atomic_bool;
using metal::mem_flags;
