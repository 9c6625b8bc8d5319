// Metal's arithmetic functions.
#pragma once

namespace metal {
// -------------------------------------------------------------------- math
// Overload sets, not templates, so that min(uint, int) or exp(int) is ambiguous
// here as it is for Apple's compiler. bfloat takes exact matches only (MSL has
// no implicit conversion to bfloat; MLX's bf16_math.h adds these overloads).
template <typename T>
using _bf = enable_if_t<is_same_v<T, bfloat>, T>;

#define MSL_V1(name, expr, T, V, N) \
  MSL_OP V name(V v) {              \
    V r;                            \
    for (int i = 0; i < N; i++) {   \
      float x = (float)v[i];        \
      r[i] = (T)(expr);             \
    }                               \
    return r;                       \
  }
#define MSL_F1(name, expr)                    \
  MSL_OP float name(float x) { return expr; } \
  MSL_V1(name, expr, float, ::float2, 2)      \
  MSL_V1(name, expr, float, ::float3, 3) MSL_V1(name, expr, float, ::float4, 4)
#define MSL_H1(name, expr)             \
  MSL_OP half name(half h) {           \
    float x = h;                       \
    return (half)(expr);               \
  }                                    \
  MSL_V1(name, expr, half, ::half2, 2) \
  MSL_V1(name, expr, half, ::half3, 3) MSL_V1(name, expr, half, ::half4, 4)
#define MSL_B1(name, expr)   \
  template <typename B>      \
  MSL_OP _bf<B> name(B b) {  \
    float x = b;             \
    return (B)(float)(expr); \
  }
#define MSL_M1(name, expr)                                                     \
  MSL_F1(name, expr) MSL_H1(name, expr) MSL_B1(name, expr) namespace precise { \
    MSL_F1(name, expr) MSL_B1(name, expr)                                      \
  }                                                                            \
  namespace fast {                                                             \
  MSL_F1(name, expr) MSL_B1(name, expr)                                        \
  }
#define MSL_V2(name, expr, T, V, N)           \
  MSL_OP V name(V a, V b) {                   \
    V r;                                      \
    for (int i = 0; i < N; i++) {             \
      float x = (float)a[i], y = (float)b[i]; \
      r[i] = (T)(expr);                       \
    }                                         \
    return r;                                 \
  }
#define MSL_F2(name, expr)                             \
  MSL_OP float name(float x, float y) { return expr; } \
  MSL_V2(name, expr, float, ::float2, 2)               \
  MSL_V2(name, expr, float, ::float3, 3) MSL_V2(name, expr, float, ::float4, 4)
#define MSL_M2(name, expr)                                                                        \
  MSL_F2(name, expr)                                                                              \
  MSL_OP half name(half a, half b) {                                                              \
    float x = a, y = b;                                                                           \
    return (half)(expr);                                                                          \
  }                                                                                               \
  MSL_V2(name, expr, half, ::half2, 2)                                                            \
  MSL_V2(name, expr, half, ::half3, 3) MSL_V2(name, expr, half, ::half4, 4) template <typename B> \
  MSL_OP _bf<B> name(B a, B b) {                                                                  \
    float x = a, y = b;                                                                           \
    return (B)(float)(expr);                                                                      \
  }                                                                                               \
  namespace precise {                                                                             \
  MSL_F2(name, expr)                                                                              \
  }                                                                                               \
  namespace fast {                                                                                \
  MSL_F2(name, expr)                                                                              \
  }

MSL_M1(exp, __builtin_expf(x))
MSL_M1(exp2, __builtin_exp2f(x)) MSL_M1(exp10, (float)__builtin_pow(10.0, x)) MSL_M1(
    log, __builtin_logf(x)) MSL_M1(log2, __builtin_log2f(x)) MSL_M1(log10, __builtin_log10f(x))
    MSL_M1(sin, __builtin_sinf(x)) MSL_M1(cos, __builtin_cosf(x)) MSL_M1(
        tan, __builtin_tanf(x)) MSL_M1(sinh, __builtin_sinhf(x)) MSL_M1(cosh, __builtin_coshf(x))
        MSL_M1(tanh, __builtin_tanhf(x)) MSL_M1(asin, __builtin_asinf(x)) MSL_M1(
            acos, __builtin_acosf(x)) MSL_M1(atan, __builtin_atanf(x))
            MSL_M1(asinh, __builtin_asinhf(x)) MSL_M1(acosh, __builtin_acoshf(x)) MSL_M1(
                atanh,
                __builtin_atanhf(x)) MSL_M1(sqrt, __builtin_sqrtf(x))
                MSL_M1(rsqrt, 1.0f / __builtin_sqrtf(x)) MSL_M1(floor, __builtin_floorf(x)) MSL_M1(
                    ceil, __builtin_ceilf(x)) MSL_M1(trunc, __builtin_truncf(x))
                    MSL_M1(round, __builtin_roundf(x)) MSL_M1(rint, __builtin_rintf(x)) MSL_M1(
                        fabs, __builtin_fabsf(x)) MSL_M1(abs, __builtin_fabsf(x))
                        MSL_M1(fract, x - __builtin_floorf(x)) MSL_M1(
                            saturate,
                            x < 0 ? 0.0f
                            : x > 1
                                ? 1.0f
                                : x)
                            MSL_M1(sign,
                                   x > 0 ? 1.0f
                                   : x < 0
                                       ? -1.0f
                                       : x) MSL_M1(sinpi, __builtin_sinf(x* M_PI_F))
                                MSL_M1(cospi, __builtin_cosf(x* M_PI_F)) MSL_M2(
                                    pow, __builtin_powf(x, y)) MSL_M2(powr, __builtin_powf(x, y))
                                    MSL_M2(atan2, __builtin_atan2f(x, y)) MSL_M2(
                                        fmod,
                                        __builtin_fmodf(x, y)) MSL_M2(fmin, __builtin_fminf(x, y))
                                        MSL_M2(fmax, __builtin_fmaxf(x, y))
                                            MSL_M2(copysign,
                                                   __builtin_copysignf(x, y)) MSL_M2(divide, x / y)
                                                MSL_M2(fdim, __builtin_fdimf(x, y)) MSL_M2(
                                                    step,
                                                    y < x ? 0.0f
                                                          : 1.0f) MSL_M2(min, __builtin_fminf(x, y))
                                                    MSL_M2(max, __builtin_fmaxf(x, y))
#define MSL_V3(name, expr, T, V, N)   \
  MSL_OP V name(V a, V b, V c) {      \
    V r;                              \
    for (int i = 0; i < N; i++) {     \
      T x = a[i], y = b[i], z = c[i]; \
      r[i] = (T)(expr);               \
    }                                 \
    return r;                         \
  }
#define MSL_T3(name, expr)                                                      \
  MSL_OP float name(float x, float y, float z) { return expr; }                 \
  MSL_OP half name(half x, half y, half z) { return (half)(expr); }             \
  template <typename B>                                                         \
  MSL_OP _bf<B> name(B x, B y, B z) {                                           \
    return (B)(float)(expr);                                                    \
  }                                                                             \
  MSL_V3(name, expr, float, ::float2, 2)                                        \
  MSL_V3(name, expr, float, ::float3, 3) MSL_V3(name, expr, float, ::float4, 4) \
      MSL_V3(name, expr, half, ::half2, 2) MSL_V3(name, expr, half, ::half3, 3) \
          MSL_V3(name, expr, half, ::half4, 4)
                                                        MSL_T3(fma, __builtin_fmaf(x, y, z)) MSL_T3(
                                                            clamp,
                                                            x<y ? y : x> z
                                                                ? z
                                                                : x) MSL_T3(mix, x + (y - x) * z)

#define MSL_PRED(name, expr)                                 \
  MSL_OP bool name(float x) { return expr; }                 \
  MSL_OP bool name(half h) {                                 \
    float x = h;                                             \
    return expr;                                             \
  }                                                          \
  template <typename B>                                      \
  MSL_OP enable_if_t<is_same_v<B, bfloat>, bool> name(B b) { \
    float x = b;                                             \
    return expr;                                             \
  }
                                                            MSL_PRED(isnan, __builtin_isnan(x))
                                                                MSL_PRED(isinf, __builtin_isinf(x))
                                                                    MSL_PRED(isfinite,
                                                                             __builtin_isfinite(x))
                                                                        MSL_PRED(signbit,
                                                                                 __builtin_signbitf(
                                                                                     x)) MSL_OP
    float ldexp(float x, int k) {
  return __builtin_ldexpf(x, k);
}
MSL_OP half ldexp(half x, int k) { return (half)__builtin_ldexpf(x, k); }
MSL_OP float frexp(float x, thread int& e) { return __builtin_frexpf(x, &e); }
MSL_OP float modf(float x, thread float& i) { return __builtin_modff(x, &i); }
MSL_OP float sincos(float x, thread float& c) {
  c = __builtin_cosf(x);
  return __builtin_sinf(x);
}

#define MSL_I(T)                                                                                 \
  MSL_OP T min(T a, T b) { return b < a ? b : a; }                                               \
  MSL_OP T max(T a, T b) { return a < b ? b : a; }                                               \
  MSL_OP T min3(T a, T b, T c) { return min(min(a, b), c); }                                     \
  MSL_OP T max3(T a, T b, T c) { return max(max(a, b), c); }                                     \
  MSL_OP T clamp(T x, T lo, T hi) { return x < lo ? lo : x > hi ? hi : x; }                      \
  MSL_OP T popcount(T x) { return (T)__builtin_popcountll((__make_unsigned(T))x); }              \
  MSL_OP T clz(T x) {                                                                            \
    return (T)(x ? __builtin_clzll((__make_unsigned(T))x) - (64 - 8 * (int)sizeof(T))            \
                 : 8 * (int)sizeof(T));                                                          \
  }                                                                                              \
  MSL_OP T ctz(T x) {                                                                            \
    return (T)(x ? __builtin_ctzll((__make_unsigned(T))x) : 8 * (int)sizeof(T));                 \
  }                                                                                              \
  MSL_OP T rotate(T v, T n) {                                                                    \
    constexpr int w = 8 * sizeof(T);                                                             \
    auto u = (__make_unsigned(T))v;                                                              \
    int k = n & (w - 1);                                                                         \
    return (T)(k ? (u << k) | (u >> (w - k)) : u);                                               \
  }                                                                                              \
  MSL_OP T extract_bits(T x, uint o, uint n) {                                                   \
    return n ? (T)((T)((__make_unsigned(T))x << (8 * sizeof(T) - o - n)) >> (8 * sizeof(T) - n)) \
             : (T)0;                                                                             \
  }                                                                                              \
  MSL_OP T reverse_bits(T x) {                                                                   \
    __make_unsigned(T) u = x, r = 0;                                                             \
    for (uint i = 0; i < 8 * sizeof(T); i++) {                                                   \
      r = (r << 1) | (u & 1);                                                                    \
      u >>= 1;                                                                                   \
    }                                                                                            \
    return (T)r;                                                                                 \
  }
MSL_I(char)
MSL_I(uchar) MSL_I(short) MSL_I(ushort) MSL_I(int) MSL_I(uint) MSL_I(long) MSL_I(ulong) MSL_OP
    int abs(int x) {
  return x < 0 ? -x : x;
}
MSL_OP short abs(short x) { return x < 0 ? -x : x; }
MSL_OP char abs(char x) { return x < 0 ? -x : x; }
MSL_OP long abs(long x) { return x < 0 ? -x : x; }
MSL_OP uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
MSL_OP int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
MSL_OP int mul24(int a, int b) { return a * b; }
MSL_OP int mad24(int a, int b, int c) { return a * b + c; }
MSL_OP float min3(float a, float b, float c) { return fmin(fmin(a, b), c); }
MSL_OP float max3(float a, float b, float c) { return fmax(fmax(a, b), c); }

template <typename T>
MSL_OP T select(T a, T b, bool c) {
  return c ? b : a;
}
template <typename T, int N, typename C>
MSL_OP vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <typename C, int N>
MSL_OP bool any(vec<C, N> c) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= !!c[i];
  return r;
}
template <typename C, int N>
MSL_OP bool all(vec<C, N> c) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= !!c[i];
  return r;
}
template <typename T, int N>
MSL_OP T dot(vec<T, N> a, vec<T, N> b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; i++) r = r + a[i] * b[i];
  return r;
}
template <typename T, int N>
MSL_OP T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <typename T, int N>
MSL_OP T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <typename T, int N>
MSL_OP vec<T, N> normalize(vec<T, N> a) {
  return a * rsqrt(dot(a, a));
}
MSL_OP float4 unpack_unorm4x8_to_float(uint x) {
  return __builtin_convertvector(as_type<metal::vec<uchar, 4>>(x), metal::vec<float, 4>) / 255.0f;
}

// matrix<T, C, R>: columns only, enough for the dequantizers seen in the wild
template <typename T, int C, int R = C>
struct matrix {
  vec<T, R> c[C];
  matrix() = default;
  template <typename U>
  explicit matrix(matrix<U, C, R> m) {
    for (int i = 0; i < C; i++) c[i] = _make<T, R>(m.c[i]);
  }
  thread vec<T, R>& operator[](int i) { return c[i]; }
  constexpr const thread vec<T, R>& operator[](int i) const { return c[i]; }
};
template <typename T, int C, int R>
MSL_OP vec<T, R> operator*(matrix<T, C, R> m, vec<T, C> v) {
  vec<T, R> r = m.c[0] * v[0];
  for (int i = 1; i < C; i++) r += m.c[i] * v[i];
  return r;
}
}  // namespace metal
typedef metal::matrix<float, 4> float4x4;
typedef metal::matrix<half, 4> half4x4;
typedef metal::matrix<bfloat, 4> bfloat4x4;
typedef metal::matrix<float, 2, 4> float2x4;
typedef metal::matrix<half, 2, 4> half2x4;
typedef metal::matrix<float, 2> float2x2;
