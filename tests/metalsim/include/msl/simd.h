// What lanes do together: barriers, sums and shuffles. They meet in runtime.cpp.
#pragma once

// ------------------------------------------------------- lockstep primitives
// Every simd or barrier call names its source line: lanes meet per line.
extern "C" {
struct msl_met {
  const char* all;
  char* result;
  uint mask;
  int first;
};  // 32 slots of 64 bytes
void msl_simd_sync(int op, int line, const void* value, uint size, msl_met* out);
void msl_tg_barrier(int flags, int line);
void msl_simd_barrier(int flags, int line);
uint msl_lane();
void msl_undefined(int line, const char* what);
}

namespace metal {
enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
MSL_RT void threadgroup_barrier(mem_flags f, int line = __builtin_LINE()) {
  msl_tg_barrier((int)f, line);
}
MSL_RT void simdgroup_barrier(mem_flags f, int line = __builtin_LINE()) {
  msl_simd_barrier((int)f, line);
}

// half, float, bfloat (by MLX), 8/16/32-bit integers, and vectors of them. 64-bit
// integers and bool go through the overloads in MLX's utils.h, as on Apple.
template <typename T>
constexpr bool _simd_ok = is_floating_point_v<typename _vt<T>::e> ||
                          (is_integral_v<typename _vt<T>::e> && sizeof(typename _vt<T>::e) <= 4 &&
                           !is_same_v<typename _vt<T>::e, bool>);
template <typename T>
using _sd = enable_if_t<_simd_ok<T>, T>;

template <typename T>
struct _meet {
  msl_met m;
  MSL_RT _meet(T v, int op, int line) { msl_simd_sync(op, line, &v, sizeof(T), &m); }
  MSL_RT T at(uint lane) const {
    T t;
    __builtin_memcpy(&t, m.all + 64 * lane, sizeof(T));
    return t;
  }
  MSL_RT bool on(uint lane) const { return lane < 32 && (m.mask >> lane & 1); }
  // one lane folds for all, as a butterfly 1, 2, 4, 8, 16 over the active lanes
  template <typename F>
  MSL_RT T fold(T identity, F f) {
    T r;
    if (m.first) {
      T v[32];
      for (int i = 0; i < 32; i++) v[i] = on(i) ? at(i) : identity;
      for (int s = 1; s < 32; s *= 2)
        for (int i = 0; i < 32; i += 2 * s) v[i] = f(v[i], v[i + s]);
      r = v[0];
      __builtin_memcpy(m.result, &r, sizeof(T));
    } else __builtin_memcpy(&r, m.result, sizeof(T));
    return r;
  }
  MSL_RT T pick(uint lane, int line) const {
    if (on(lane)) return at(lane);
    msl_undefined(line, "simd shuffle reads an inactive lane");
    T t;
    __builtin_memset(&t, 0xff, sizeof(T));
    return t;
  }
};

#define MSL_LINE int line = __builtin_LINE()
#define MSL_FOLD(name, op, identity, expr)                                           \
  template <typename T>                                                              \
  MSL_RT _sd<T> name(T v, MSL_LINE) {                                                \
    return _meet<T>(v, op, line).fold(identity, [](T a, T b) { return (T)(expr); }); \
  }
template <typename T>
constexpr T _lo() {
  if constexpr (is_floating_point_v<T>) return -numeric_limits<T>::infinity();
  else return numeric_limits<T>::min();
}
template <typename T>
constexpr T _hi() {
  if constexpr (is_floating_point_v<T>) return numeric_limits<T>::infinity();
  else return numeric_limits<T>::max();
}
MSL_FOLD(simd_sum, 1, (T)0, a + b)
MSL_FOLD(simd_product, 2, (T)1, a* b) MSL_FOLD(simd_max, 3, _lo<T>(), a < b ? b : a)
    MSL_FOLD(simd_min, 4, _hi<T>(), b < a ? b : a) MSL_FOLD(simd_and, 5, (T) ~(T)0, a& b)
        MSL_FOLD(simd_or, 6, (T)0, a | b) MSL_FOLD(simd_xor, 7, (T)0, a ^ b)

            template <typename T>
            MSL_RT _sd<T> simd_shuffle(T v, ushort lane, MSL_LINE) {
  return _meet<T>(v, 10, line).pick(lane, line);
}
template <typename T>
MSL_RT _sd<T> simd_broadcast(T v, ushort lane, MSL_LINE) {
  return _meet<T>(v, 11, line).pick(lane, line);
}
template <typename T>
MSL_RT _sd<T> simd_broadcast_first(T v, MSL_LINE) {
  _meet<T> m(v, 12, line);
  return m.at(__builtin_ctz(m.m.mask));
}
template <typename T>
MSL_RT _sd<T> simd_shuffle_xor(T v, ushort mask, MSL_LINE) {
  return _meet<T>(v, 13, line).pick(msl_lane() ^ mask, line);
}
// the lanes off the end keep their own value (MSL: unspecified but harmless)
template <typename T>
MSL_RT _sd<T> simd_shuffle_down(T v, ushort d, MSL_LINE) {
  _meet<T> m(v, 14, line);
  uint l = msl_lane() + d;
  return l < 32 ? m.pick(l, line) : v;
}
template <typename T>
MSL_RT _sd<T> simd_shuffle_up(T v, ushort d, MSL_LINE) {
  _meet<T> m(v, 15, line);
  uint l = msl_lane() - d;
  return l < 32 ? m.pick(l, line) : v;
}
template <typename T>
MSL_RT _sd<T> simd_shuffle_rotate_down(T v, ushort d, MSL_LINE) {
  return _meet<T>(v, 16, line).pick((msl_lane() + d) & 31, line);
}
template <typename T>
MSL_RT _sd<T> simd_shuffle_rotate_up(T v, ushort d, MSL_LINE) {
  return _meet<T>(v, 17, line).pick((msl_lane() - d) & 31, line);
}
template <typename T>
MSL_RT _sd<T> simd_shuffle_and_fill_down(T v, T fill, ushort d, MSL_LINE) {
  _meet<T> m(v, 18, line), f(fill, 18, line);
  uint l = msl_lane() + d;
  return l < 32 ? m.pick(l, line) : f.pick(l - 32, line);
}
template <typename T>
MSL_RT _sd<T> simd_shuffle_and_fill_up(T v, T fill, ushort d, MSL_LINE) {
  _meet<T> m(v, 19, line), f(fill, 19, line);
  uint l = msl_lane() - d;
  return l < 32 ? m.pick(l, line) : f.pick(l + 32, line);
}
template <typename T>
MSL_RT _sd<T> simd_prefix_inclusive_sum(T v, MSL_LINE) {
  _meet<T> m(v, 20, line);
  T s = 0;
  for (uint i = 0; i <= msl_lane(); i++)
    if (m.on(i)) s = s + m.at(i);
  return s;
}
template <typename T>
MSL_RT _sd<T> simd_prefix_exclusive_sum(T v, MSL_LINE) {
  _meet<T> m(v, 21, line);
  T s = 0;
  for (uint i = 0; i < msl_lane(); i++)
    if (m.on(i)) s = s + m.at(i);
  return s;
}
template <typename T>
MSL_RT _sd<T> simd_prefix_inclusive_product(T v, MSL_LINE) {
  _meet<T> m(v, 22, line);
  T s = 1;
  for (uint i = 0; i <= msl_lane(); i++)
    if (m.on(i)) s = s * m.at(i);
  return s;
}
template <typename T>
MSL_RT _sd<T> simd_prefix_exclusive_product(T v, MSL_LINE) {
  _meet<T> m(v, 23, line);
  T s = 1;
  for (uint i = 0; i < msl_lane(); i++)
    if (m.on(i)) s = s * m.at(i);
  return s;
}
MSL_RT bool simd_any(bool p, MSL_LINE) {
  _meet<uint> m(p, 24, line);
  return m.fold(0u, [](uint a, uint b) { return a | b; });
}
MSL_RT bool simd_all(bool p, MSL_LINE) {
  _meet<uint> m(p, 25, line);
  return m.fold(1u, [](uint a, uint b) { return a & b; });
}
struct simd_vote {
  ulong v;
  explicit operator ulong() const { return v; }
  explicit operator uint() const { return (uint)v; }
};
MSL_RT simd_vote simd_ballot(bool p, MSL_LINE) {
  _meet<uint> m(p, 26, line);
  ulong r = 0;
  for (int i = 0; i < 32; i++)
    if (m.on(i) && m.at(i)) r |= 1ul << i;
  return {r};
}
MSL_RT simd_vote simd_active_threads_mask(MSL_LINE) {
  _meet<uint> m(1, 27, line);
  return {m.m.mask};
}
MSL_RT bool simd_is_first(MSL_LINE) {
  _meet<uint> m(1, 28, line);
  return msl_lane() == (uint)__builtin_ctz(m.m.mask);
}
// quads: four lanes; here the whole simdgroup must come along
template <typename T>
MSL_RT _sd<T> quad_sum(T v, MSL_LINE) {
  _meet<T> m(v, 30, line);
  uint q = msl_lane() & ~3u;
  T s = 0;
  for (uint i = q; i < q + 4; i++)
    if (m.on(i)) s = s + m.at(i);
  return s;
}
template <typename T>
MSL_RT _sd<T> quad_shuffle_xor(T v, ushort mask, MSL_LINE) {
  return _meet<T>(v, 31, line).pick(msl_lane() ^ (mask & 3), line);
}
template <typename T>
MSL_RT _sd<T> quad_shuffle_down(T v, ushort d, MSL_LINE) {
  _meet<T> m(v, 32, line);
  uint l = (msl_lane() & 3) + d;
  return l < 4 ? m.pick((msl_lane() & ~3u) + l, line) : v;
}
template <typename T>
MSL_RT _sd<T> quad_broadcast(T v, ushort lane, MSL_LINE) {
  return _meet<T>(v, 33, line).pick((msl_lane() & ~3u) + (lane & 3), line);
}
}  // namespace metal
