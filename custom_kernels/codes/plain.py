"""MXFP8, MXFP4 and Q8_0 inside a kernel: codes under one scale per 32."""

MXFP8 = """
#define LUT 1
// A code's bits put where a half has them: the value times 2 to the power -8.
inline half2 codes(uint w) {
  return as_half2(((w << 8) & 0x80008000u) | ((w << 7) & 0x3f803f80u));
}
// 2 to the power e - 127; 255 stands for NaN.
inline float power(uint e) {
  return as_type<float>(e == 0 || e == 255u ? e << 23 | 0x00400000u : e << 23);
}
"""

MXFP8_VALUES = """
struct Group { uint4 w0, w1; uchar scale; };
inline Group load_group(const device uint* weight, const device uchar* scales, uint row, uint g,
                        uint columns) {
  Group group;
  uint at = row * (columns / 32) + g;
  group.w0 = ((const device uint4*)weight)[2 * at];
  group.w1 = ((const device uint4*)weight)[2 * at + 1];
  group.scale = scales[at];
  return group;
}
inline void eight(Group group, int j, thread float* v, const threadgroup uint4*) {
  float scale = power(group.scale);
  for (int i = 0; i < 4; i++) {
    uint4 w = j / 2 ? group.w1 : group.w0;
    uint four = j % 2 ? (i / 2 ? w.w : w.z) : (i / 2 ? w.y : w.x);
    thread float* at = v + i / 2 * 4 + i % 2;
    put(codes(four >> (8 * (i % 2))), 256.0f, 0, at, 2);
    at[0] *= scale;
    at[2] *= scale;
  }
}
"""

MXFP4 = """
#define LUT 1
struct Pack { uint4 w0, w1; uint scales; };
inline Pack load_pack(const device uint* weight, const device uchar* scales, uint row, uint c,
                      uint columns) {
  Pack p;
  uint at = row * (columns / 64) + c;
  p.w0 = ((const device uint4*)weight)[2 * at];
  p.w1 = ((const device uint4*)weight)[2 * at + 1];
  p.scales = ((const device ushort*)scales)[at];
  return p;
}
// Code i of the low and of the high 16 bits: its bits are a half's 2^-14 of the value.
inline half2 codes(uint w, int i) {
  w <<= 12 - 4 * i;
  return as_half2((w & 0x80008000u) | ((w >> 3) & 0x0e000e00u));
}
inline uint word(Pack p, uint h, int i) {
  uint4 w = h ? p.w1 : p.w0;
  return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w;
}
// 2 to the power e - 127.
inline float power(uint e) { return as_type<float>(e ? e << 23 : 0x00400000u); }
inline float scale_of(Pack p, uint h) { return power((p.scales >> (8 * h)) & 255u); }
"""

MXFP4_DOT = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float, float,
                       const threadgroup uint4*) {
  pair sum = make_pair(0, 0);
  for (int i = 0; i < 16; i++) sum = mad(codes(word(p, h, i / 4), i % 4), x[i], sum);
  return total(sum) * (16384.0f * scale) * scale_of(p, h);
}
"""

MXFP4_VALUES = """
struct Group { uint4 w; uchar scale; };
inline Group load_group(const device uint* weight, const device uchar* scales, uint row, uint g,
                        uint columns) {
  Group group;
  uint at = row * (columns / 32) + g;
  group.w = ((const device uint4*)weight)[at];
  group.scale = scales[at];
  return group;
}
inline void eight(Group group, int j, thread float* v, const threadgroup uint4*) {
  float scale = power(group.scale);
  uint w = j == 0 ? group.w.x : j == 1 ? group.w.y : j == 2 ? group.w.z : group.w.w;
  for (int i = 0; i < 4; i++) {
    put(codes(w, i), 16384.0f, 0, v + i, 4);
    v[i] *= scale;
    v[i + 4] *= scale;
  }
}
"""

Q8_0 = """
#define LUT 1
struct Pack { uint4 w0, w1, w2, w3; uint d; };
inline Pack load_pack(const device int8_t* weight, const device float16_t* d, uint row, uint c,
                      uint columns) {
  Pack p;
  uint at = row * (columns / 64) + c;
  const device uint4* w = (const device uint4*)weight + 4 * at;
  p.w0 = w[0];
  p.w1 = w[1];
  p.w2 = w[2];
  p.w3 = w[3];
  p.d = ((const device uint*)d)[at];
  return p;
}
// Bytes i and i + 2 of a word, as half2.
inline half2 codes(uint w, int i) {
  w = ((w ^ 0x80808080u) >> (8 * i)) & 0x00ff00ffu;
  return mad2(as_half2(w | 0x64006400u), fill2(1.0f), fill2(-1152.0f));
}
inline uint word(Pack p, uint h, int i) {
  uint4 w = h ? (i < 4 ? p.w2 : p.w3) : (i < 4 ? p.w0 : p.w1);
  i &= 3;
  return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w;
}
inline float scale_of(Pack p, uint h) { return h ? high(as_half2(p.d)) : low(as_half2(p.d)); }
"""

Q8_0_DOT = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float, float,
                       const threadgroup uint4*) {
  pair sum = make_pair(0, 0);
  for (int i = 0; i < 16; i++) sum = mad(codes(word(p, h, i / 2), i % 2), x[i], sum);
  return total(sum) * scale_of(p, h) * scale;
}
"""

Q8_0_VALUES = """
struct Group { uint4 w0, w1; float16_t d; };
inline Group load_group(const device int8_t* weight, const device float16_t* d, uint row, uint g,
                        uint columns) {
  Group group;
  uint at = row * (columns / 32) + g;
  group.w0 = ((const device uint4*)weight)[2 * at];
  group.w1 = ((const device uint4*)weight)[2 * at + 1];
  group.d = d[at];
  return group;
}
inline void eight(Group group, int j, thread float* v, const threadgroup uint4*) {
  uint4 w = j / 2 ? group.w1 : group.w0;
  for (int i = 0; i < 4; i++) {
    uint four = j % 2 ? (i / 2 ? w.w : w.z) : (i / 2 ? w.y : w.x);
    put(codes(four, i % 2), float(group.d), 0, v + i / 2 * 4 + i % 2, 2);
  }
}
"""
