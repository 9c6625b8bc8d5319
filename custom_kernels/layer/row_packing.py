"""How a threadgroup rounds a row into its layout, as text: a pair of channels to a thread.

Threads 32 g to 32 g + 31 have the channels that share an exponent in a KV row, half as many in an index
row. The bits are those of the forms that decode states use.
"""

PAIR = """
template <typename T> inline float as(float v) { return float(static_cast<T>(v)); }
template <typename T> inline void put_pair(device T* out, thread const float* v) {
  out[0] = static_cast<T>(v[0]);
  out[1] = static_cast<T>(v[1]);
}

// The smallest power of two that is no less than the largest size in a group over the largest code.
// As bits, which order floats as their values do, and a NaN above them all.
inline float scale_of(thread const float* v, uint lanes, float floor, float most) {
  uint top = max(as_type<uint>(fabs(v[0])), as_type<uint>(fabs(v[1])));
  for (uint i = 1; i < lanes; i *= 2) top = max(top, simd_shuffle_xor(top, ushort(i)));
  top = as_type<uint>(as_type<float>(max(top, as_type<uint>(floor))) / most);
  return as_type<float>(((top >> 23) + ((top & 0x7fffffu) != 0 ? 1u : 0u)) << 23);
}
"""

KV = """
// To nearest, ties to even; below the normal numbers a sum with 2^14 rounds.
inline uint e4m3(float v) {
  uint w = as_type<uint>(v), sign = w >> 24 & 0x80u;
  w &= 0x7fffffffu;
  if (w > 0x7f800000u) return sign | 0x7fu;
  if (w >= 0x43e00000u) return sign | 0x7eu;
  if (w < 0x3c800000u)
    return sign | (as_type<uint>(as_type<float>(w) + 16384.0f) - 0x46800000u);
  return sign | ((w + 0x7ffffu + (w >> 20 & 1) - 0x3c000000u) >> 20);
}
template <typename T>
inline void pack_kv(thread const float* v, device uint* out, int width, int coded, int head, uint at) {
  device uchar* bytes = (device uchar*)out;
  int c = 2 * int(at), groups = coded / 64;
  float scale = scale_of(v, 32, 1e-4f, 448.0f);
  if (c < coded) {
    bytes[c] = uchar(e4m3(v[0] / scale));
    bytes[c + 1] = uchar(e4m3(v[1] / scale));
    if (c % 64 == 0) bytes[coded + c / 64] = uchar(as_type<uint>(scale) >> 23);
  } else if (c < width) {
    put_pair((device T*)(bytes + head) + (c - coded), v);
  }
  if (int(at) < head - coded - groups) bytes[coded + groups + at] = 0;
}
"""

INDEX = """
inline uint e2m1(float v, float x) {
  float y = fabs(v);
  if (y != y) return 0;
  float code = y < 2.0f ? rint(2.0f * y) : y < 4.0f ? rint(y) + 2.0f : rint(0.5f * y) + 4.0f;
  return uint(code) | (x < 0.0f ? 8u : 0u);
}
inline void pack_index(thread const float* v, device uint* out, int width, uint at) {
  device uchar* bytes = (device uchar*)out;
  int half_width = width / 2, groups = width / 32;
  float scale = scale_of(v, 16, as_type<float>(0x01400000u), 6.0f);
  if (int(at) < half_width) {
    bytes[at] = uchar(e2m1(v[0] / scale, v[0]) | e2m1(v[1] / scale, v[1]) << 4);
    if (at % 16 == 0) bytes[half_width + at / 16] = uchar(as_type<uint>(scale) >> 23);
  }
  if (int(at) < (4 - groups % 4) % 4) bytes[half_width + groups + at] = 0;
}
"""

# Rounded after every 16 values, as the transform of MLX is on a GPU.
SPREAD = """
template <typename T>
inline void spread(thread float* v, int width, threadgroup float* row, uint at) {
  float a = v[0];
  v[0] = a + v[1];
  v[1] = a - v[1];
  for (int h = 2; h < width; h *= 2) {
    float other[2];
    if (h < 64) {
      for (int i = 0; i < 2; i++) other[i] = simd_shuffle_xor(v[i], ushort(h / 2));
    } else {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (2 * int(at) < width) for (int i = 0; i < 2; i++) row[2 * at + i] = v[i];
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int i = 0; i < 2; i++) other[i] = 2 * int(at) < width ? row[(2 * at + i) ^ h] : 0.0f;
    }
    bool rounds = h == 8 || h == 128 || 2 * h == width;
    for (int i = 0; i < 2; i++) {
      v[i] = (2 * at & h) != 0 ? other[i] - v[i] : v[i] + other[i];
      if (rounds) v[i] = as<T>(v[i]);
    }
  }
  float scale = 1.0f / sqrt(float(width));
  for (int i = 0; i < 2; i++) v[i] = as<T>(v[i] * scale);
}
"""
