"""Q2_K and Q4_K inside a kernel: codes of two and four bits under scales and offsets.

A code ORed into 0x6400 is the half 1024 + code, as bits 0..9 count ones there.
"""

Q2_K = """
#define LUT 1
struct Pack { uint4 w; uint scales; uint d; };
inline Pack load_pack(const device uint* weight, const device uchar* scales,
                      const device float16_t* d, uint row, uint c, uint columns) {
  Pack p;
  uint at = row * (columns / 64) + c;
  p.w = ((const device uint4*)weight)[at];
  p.scales = ((const device uint*)scales)[at];
  p.d = ((const device uint*)d)[row * (columns / 256) + c / 4];
  return p;
}
// Code i of the low and of the high 16 bits, as half2.
inline half2 codes(uint w, int i) {
  if (i > 4) { w >>= 10; i -= 5; }
  float unit = 1.0f / float(1 << (2 * i));
  return mad2(as_half2((w & (0x00030003u << (2 * i))) | 0x64006400u), fill2(unit),
              fill2(-1024.0f * unit));
}
// Codes, and scale with offset, of half s of group h.
inline uint word(Pack p, uint h, int s) {
  return h ? (s ? p.w.w : p.w.z) : (s ? p.w.y : p.w.x);
}
inline uint scale_byte(Pack p, uint h, int s) { return (p.scales >> (16 * h + 8 * s)) & 255u; }
"""

Q2_K_DOT = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float sum0, float sum1,
                       const threadgroup uint4*) {
  float result = 0;
  for (int s = 0; s < 2; s++) {
    uint w = word(p, h, s), byte = scale_byte(p, h, s);
    pair sum = make_pair(0, 0);
    for (int i = 0; i < 8; i++) sum = mad(codes(w, i), x[8 * s + i], sum);
    result = fma(low(as_half2(p.d)) * float(byte & 15u) * scale, total(sum), result);
    result = fma(-high(as_half2(p.d)) * float(byte >> 4), s ? sum1 : sum0, result);
  }
  return result;
}
"""

Q2_K_VALUES = """
struct Group { uint2 w; ushort scales; uint d; };
inline Group load_group(const device uint* weight, const device uchar* scales,
                        const device float16_t* d, uint row, uint g, uint columns) {
  Group group;
  uint at = row * (columns / 32) + g;
  group.w = ((const device uint2*)weight)[at];
  group.scales = ((const device ushort*)scales)[at];
  group.d = ((const device uint*)d)[row * (columns / 256) + g / 8];
  return group;
}
inline void eight(Group group, int j, thread float* v, const threadgroup uint4*) {
  uint w = j / 2 ? group.w.y : group.w.x, byte = (uint(group.scales) >> (8 * (j / 2))) & 255u;
  float d = low(as_half2(group.d)) * float(byte & 15u);
  float least = -high(as_half2(group.d)) * float(byte >> 4);
  // The four low and the four high codes of 16 bits, as those of two words' lowest bytes.
  w = j % 2 ? w >> 16 : w;
  w = (w & 0xffu) | ((w & 0xff00u) << 8);
  for (int i = 0; i < 4; i++) put(codes(w, i), d, least, v + i, 4);
}
"""

Q2_K_BYTES = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float sum0, float sum1,
                       const threadgroup uint4*) {
  float result = 0;
  for (int s = 0; s < 2; s++) {
    uint w = word(p, h, s), byte = scale_byte(p, h, s);
    int sum = 0;
    for (int i = 0; i < 4; i++) sum = dot4((w >> (2 * i)) & 0x03030303u, x[4 * s + i], sum);
    result = fma(low(as_half2(p.d)) * float(byte & 15u) * scale, float(sum), result);
    result = fma(-high(as_half2(p.d)) * float(byte >> 4), s ? sum1 : sum0, result);
  }
  return result;
}
"""

Q4_K = """
#define LUT 1
struct Pack { uint4 w0, w1; uint scales, mins, d; };
// s and m of two sub-blocks, a byte each, from the twelve bytes of eight.
inline Pack load_pack(const device uint* weight, const device uint* scales,
                      const device float16_t* d, uint row, uint c, uint columns) {
  Pack p;
  uint at = row * (columns / 64) + c, block = row * (columns / 256) + c / 4;
  p.w0 = ((const device uint4*)weight)[2 * at];
  p.w1 = ((const device uint4*)weight)[2 * at + 1];
  p.d = ((const device uint*)d)[block];
  uint shift = 16 * (c & 1u);
  uint s = scales[3 * block] >> shift, m = scales[3 * block + 1] >> shift;
  uint rest = scales[3 * block + 2] >> shift;
  bool late = (c & 2u) != 0;
  p.scales = late ? (rest & 0x0f0fu) | ((s & 0xc0c0u) >> 2) : s & 0x3f3fu;
  p.mins = late ? ((rest >> 4) & 0x0f0fu) | ((m & 0xc0c0u) >> 2) : m & 0x3f3fu;
  return p;
}
// Code i of the low and of the high 16 bits, as half2.
inline half2 codes(uint w, int i) {
  if (i > 1) w >>= 8;
  if (i & 1) return mad2(as_half2((w & 0x00f000f0u) | 0x64006400u), fill2(0.0625f), fill2(-64.0f));
  return mad2(as_half2((w & 0x000f000fu) | 0x64006400u), fill2(1.0f), fill2(-1024.0f));
}
inline uint word(Pack p, uint h, int i) {
  uint4 w = h ? p.w1 : p.w0;
  return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w;
}
"""

Q4_K_DOT = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float sum0, float sum1,
                       const threadgroup uint4*) {
  pair sum = make_pair(0, 0);
  for (int i = 0; i < 16; i++) sum = mad(codes(word(p, h, i / 4), i % 4), x[i], sum);
  float s = float((p.scales >> (8 * h)) & 255u), m = float((p.mins >> (8 * h)) & 255u);
  return low(as_half2(p.d)) * s * scale * total(sum) - high(as_half2(p.d)) * m * (sum0 + sum1);
}
"""

Q4_K_VALUES = """
struct Group { uint4 w; float d, least; };
inline Group load_group(const device uint* weight, const device uint* scales,
                        const device float16_t* d, uint row, uint g, uint columns) {
  Group group;
  uint block = row * (columns / 256) + g / 8, shift = 8 * (g % 4);
  group.w = ((const device uint4*)weight)[row * (columns / 32) + g];
  uint s = scales[3 * block] >> shift, m = scales[3 * block + 1] >> shift;
  uint rest = scales[3 * block + 2] >> shift, ds = ((const device uint*)d)[block];
  bool late = g % 8 > 3;
  s = late ? (rest & 15u) | ((s & 0xc0u) >> 2) : s & 63u;
  m = late ? ((rest >> 4) & 15u) | ((m & 0xc0u) >> 2) : m & 63u;
  group.d = low(as_half2(ds)) * float(s);
  group.least = -high(as_half2(ds)) * float(m);
  return group;
}
inline void eight(Group group, int j, thread float* v, const threadgroup uint4*) {
  uint w = j == 0 ? group.w.x : j == 1 ? group.w.y : j == 2 ? group.w.z : group.w.w;
  for (int i = 0; i < 4; i++) put(codes(w, i), group.d, group.least, v + i, 4);
}
"""

Q4_K_BYTES = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float sum0, float sum1,
                       const threadgroup uint4*) {
  int sum = 0;
  for (int i = 0; i < 8; i++)
    sum = dot4((word(p, h, i / 2) >> (4 * (i % 2))) & 0x0f0f0f0fu, x[i], sum);
  float s = float((p.scales >> (8 * h)) & 255u), m = float((p.mins >> (8 * h)) & 255u);
  return low(as_half2(p.d)) * s * scale * float(sum) - high(as_half2(p.d)) * m * (sum0 + sum1);
}
"""
