// Words, scalar and vector types, and type traits of the Metal language.
#pragma once

// ---------------------------------------------------------------- qualifiers
#define thread
#define kernel
#ifdef MSL_STRICT
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif
#define METAL_FUNC inline
#define METAL_CONST
#define __METAL_VERSION__ 310
#define __METAL__ 1
#define __HAVE_BFLOAT__ 1

// Code of the simulator itself must not show up as the kernel's memory traffic.
#define MSL_RT inline __attribute__((no_sanitize("thread", "undefined")))
#define MSL_OP static inline __attribute__((always_inline))

// -------------------------------------------------------------- scalar types
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;

inline constexpr half operator""h(long double x) { return half(x); }
inline constexpr half operator""h(unsigned long long x) { return half(x); }
inline constexpr bfloat operator"" bf(long double x) { return bfloat(float(x)); }

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF INFINITY
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX ((half)65504.0f)
#define MAXHALF HALF_MAX
#define MAXFLOAT FLT_MAX
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT2_F 1.41421356237309504880f

// -------------------------------------------------------------- vector types
namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <typename T>
struct _vt {
  static constexpr int n = 1;
  using e = T;
};
template <typename T, int N>
struct _vt<vec<T, N>> {
  static constexpr int n = N;
  using e = T;
};
template <typename T, int N>
struct _vt<const vec<T, N>> {
  static constexpr int n = N;
  using e = T;
};

template <typename T, int N, typename A>
MSL_OP constexpr void _put(vec<T, N>& r, int& i, A a) {
  if constexpr (_vt<A>::n == 1) {
    r[i] = (T)a;
    i += 1;
  } else {
    for (int k = 0; k < _vt<A>::n; k++) r[i + k] = (T)a[k];
    i += _vt<A>::n;
  }
}
// The MSL constructors float4(x), float4(half4), float4(float2, 0, 1), ...
template <typename T, int N, typename... A>
MSL_OP constexpr vec<T, N> _make(A... a) {
  if constexpr (sizeof...(A) == 0) return vec<T, N>{};
  else if constexpr (sizeof...(A) == 1) {
    if constexpr ((_vt<A>::n + ...) == 1) return vec<T, N>((T)(a, ...));
    else return __builtin_convertvector((a, ...), vec<T, N>);
  } else {
    static_assert((_vt<A>::n + ...) == N, "wrong number of vector components");
    if constexpr (((_vt<A>::n == 1) && ...)) return vec<T, N>{(T)a...};
    else {
      vec<T, N> r{};
      int i = 0;
      (_put<T, N>(r, i, a), ...);
      return r;
    }
  }
}
template <typename V>
struct _cast {};  // (float4)h becomes _cast<float4>()->*h
template <typename V, typename A>
MSL_OP constexpr V operator->*(_cast<V>, A a) {
  return _make<typename _vt<V>::e, _vt<V>::n>(a);
}
}  // namespace metal

#define MSL_VEC(T)                                                                 \
  typedef metal::vec<T, 2> T##2;                                                   \
  typedef metal::vec<T, 3> T##3;                                                   \
  typedef metal::vec<T, 4> T##4;                                                   \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T)))); \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T))));
MSL_VEC(char)
MSL_VEC(uchar) MSL_VEC(short) MSL_VEC(ushort) MSL_VEC(int) MSL_VEC(uint) MSL_VEC(long)
    MSL_VEC(ulong) MSL_VEC(half) MSL_VEC(float) MSL_VEC(bfloat) MSL_VEC(bool)
// Function-like macros see only "float4(": the type name alone is left as it is.
#define char2(...) metal::_make<char, 2>(__VA_ARGS__)
#define char3(...) metal::_make<char, 3>(__VA_ARGS__)
#define char4(...) metal::_make<char, 4>(__VA_ARGS__)
#define uchar2(...) metal::_make<uchar, 2>(__VA_ARGS__)
#define uchar3(...) metal::_make<uchar, 3>(__VA_ARGS__)
#define uchar4(...) metal::_make<uchar, 4>(__VA_ARGS__)
#define short2(...) metal::_make<short, 2>(__VA_ARGS__)
#define short3(...) metal::_make<short, 3>(__VA_ARGS__)
#define short4(...) metal::_make<short, 4>(__VA_ARGS__)
#define ushort2(...) metal::_make<ushort, 2>(__VA_ARGS__)
#define ushort3(...) metal::_make<ushort, 3>(__VA_ARGS__)
#define ushort4(...) metal::_make<ushort, 4>(__VA_ARGS__)
#define int2(...) metal::_make<int, 2>(__VA_ARGS__)
#define int3(...) metal::_make<int, 3>(__VA_ARGS__)
#define int4(...) metal::_make<int, 4>(__VA_ARGS__)
#define uint2(...) metal::_make<uint, 2>(__VA_ARGS__)
#define uint3(...) metal::_make<uint, 3>(__VA_ARGS__)
#define uint4(...) metal::_make<uint, 4>(__VA_ARGS__)
#define long2(...) metal::_make<long, 2>(__VA_ARGS__)
#define ulong2(...) metal::_make<ulong, 2>(__VA_ARGS__)
#define half2(...) metal::_make<half, 2>(__VA_ARGS__)
#define half3(...) metal::_make<half, 3>(__VA_ARGS__)
#define half4(...) metal::_make<half, 4>(__VA_ARGS__)
#define float2(...) metal::_make<float, 2>(__VA_ARGS__)
#define float3(...) metal::_make<float, 3>(__VA_ARGS__)
#define float4(...) metal::_make<float, 4>(__VA_ARGS__)
#define bfloat2(...) metal::_make<bfloat, 2>(__VA_ARGS__)
#define bfloat4(...) metal::_make<bfloat, 4>(__VA_ARGS__)

    // as_type<T>(x): same size, other type. 3-vectors are padded to 4, as in MSL.
    template <typename T, typename U>
    MSL_OP constexpr T as_type(U x) {
  static_assert(sizeof(T) == sizeof(U), "as_type between types of different size");
  return __builtin_bit_cast(T, x);
}

namespace metal {
using ::as_type;

// ------------------------------------------------------------- type traits
template <typename T, T v>
struct integral_constant {
  static constexpr T value = v;
  constexpr operator T() const { return v; }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;
template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename F>
struct conditional {
  using type = T;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;
template <typename A, typename B>
constexpr bool is_same_v = __is_same(A, B);
template <typename A, typename B>
struct is_same : integral_constant<bool, __is_same(A, B)> {};
template <typename A, typename B>
constexpr bool is_convertible_v = __is_convertible(A, B);
template <typename T>
using remove_cv_t = __remove_cv(T);
template <typename T>
using remove_reference_t = __remove_reference_t(T);
template <typename T>
struct remove_reference {
  using type = __remove_reference_t(T);
};
template <typename T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename T>
constexpr bool is_integral_v = __is_integral(T);
template <typename T>
struct is_integral : integral_constant<bool, __is_integral(T)> {};
template <typename T>
struct is_floating_point : integral_constant<bool, is_floating_point_v<T>> {};
template <typename T>
constexpr bool is_unsigned_v = __is_unsigned(T);
template <typename T>
constexpr bool is_signed_v = __is_signed(T);
template <typename T>
constexpr bool is_scalar_v = is_floating_point_v<T> || is_integral_v<T>;
template <typename... T>
struct make_void {
  typedef void type;
};
template <typename... T>
using void_t = typename make_void<T...>::type;

template <typename T>
struct numeric_limits;
#define MSL_ILIM(T, lo, hi)                    \
  template <>                                  \
  struct numeric_limits<T> {                   \
    static constexpr T min() { return lo; }    \
    static constexpr T max() { return hi; }    \
    static constexpr T lowest() { return lo; } \
  };
MSL_ILIM(bool, false, true)
MSL_ILIM(char, -128, 127)
MSL_ILIM(signed char, -128, 127) MSL_ILIM(uchar, 0, 255) MSL_ILIM(short, -32768, 32767)
    MSL_ILIM(ushort, 0, 65535) MSL_ILIM(int, INT_MIN, INT_MAX) MSL_ILIM(uint, 0, UINT_MAX)
        MSL_ILIM(long, -0x7fffffffffffffffL - 1, 0x7fffffffffffffffL) MSL_ILIM(ulong, 0, ~0UL)
#define MSL_FLIM(T, mn, mx, ep)                                      \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr T min() { return (T)mn; }                       \
    static constexpr T max() { return (T)mx; }                       \
    static constexpr T lowest() { return (T)(-mx); }                 \
    static constexpr T epsilon() { return (T)ep; }                   \
    static constexpr T infinity() { return (T)__builtin_inff(); }    \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
  };
            MSL_FLIM(float, FLT_MIN, FLT_MAX, FLT_EPSILON)
                MSL_FLIM(half, 6.103515625e-05f, 65504.0f, 9.765625e-04f)
                    MSL_FLIM(bfloat, FLT_MIN, 3.38953139e38f, 7.8125e-03f)

template <typename T, size_t N>
struct array {
  T v[N];
  thread T& operator[](size_t i) { return v[i]; }
  constexpr const thread T& operator[](size_t i) const { return v[i]; }
};
}  // namespace metal
