"""IQ2_XXS inside a kernel: grid points from a table in threadgroup memory, and their signs."""

# Bits 0..9 of 0x6400 count ones: a code ORed into them is 1024 + code.
IQ2 = """
#define LUT 256
struct Pack { uint4 w; float d; };
inline Pack load_pack(const device uint* weight, const device float16_t* d, uint row, uint c,
                      uint columns) {
  Pack p;
  p.w = ((const device uint4*)weight)[row * (columns / 64) + c];
  p.d = float(d[row * (columns / 256) + c / 4]);
  return p;
}
// Signs of 32 columns, a byte for eight: the eighth makes their number even.
inline uint sign_bytes(uint b) {
  uint s = (b & 0x7fu) | ((b & 0x3f80u) << 1) | ((b & 0x1fc000u) << 2) | ((b & 0xfe00000u) << 3);
  uint t = s ^ (s >> 4);
  t ^= t >> 2;
  t ^= t >> 1;
  return s | ((t & 0x01010101u) << 7);
}
// The scale lies above the signs.
inline float scaled(float d, uint signs) { return d * (0.5f + float(signs >> 28)) * 0.25f; }
inline float scale_of(Pack p, uint h) { return scaled(p.d, h ? p.w.w : p.w.y); }
// Pair i of grid point k with its signs, as bits of a half2.
inline half2 signed_pair(uint g, uint signs, uint spread) {
  return as_half2(g ^ ((signs * spread) & 0x80008000u));
}
"""

IQ2_DOT = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float, float,
                       const threadgroup uint4* lut) {
  uint a = h ? p.w.z : p.w.x, s = sign_bytes(h ? p.w.w : p.w.y);
  pair sum = make_pair(0, 0);
  for (int k = 0; k < 4; k++) {
    uint4 g = lut[(a >> (8 * k)) & 255u];
    uint v = (s >> (8 * k)) & 255u;
    sum = mad(signed_pair(g.x, v, 0x08008000u), x[4 * k], sum);
    sum = mad(signed_pair(g.y, v, 0x04004000u), x[4 * k + 1], sum);
    sum = mad(signed_pair(g.z, v, 0x02002000u), x[4 * k + 2], sum);
    sum = mad(signed_pair(g.w, v, 0x01001000u), x[4 * k + 3], sum);
  }
  return total(sum) * scale_of(p, h) * scale;
}
"""

IQ2_VALUES = """
struct Group { uint2 w; float16_t d; };
inline Group load_group(const device uint* weight, const device float16_t* d, uint row, uint g,
                        uint columns) {
  Group group;
  group.w = ((const device uint2*)weight)[row * (columns / 32) + g];
  group.d = d[row * (columns / 256) + g / 8];
  return group;
}
inline void values(Group group, thread float* v, const threadgroup uint4* lut) {
  uint s = sign_bytes(group.w.y);
  float scale = scaled(float(group.d), group.w.y);
  for (int k = 0; k < 4; k++) {
    uint4 point = lut[(group.w.x >> (8 * k)) & 255u];
    uint b = (s >> (8 * k)) & 255u;
    put(signed_pair(point.x, b, 0x08008000u), scale, 0, v + 8 * k, 4);
    put(signed_pair(point.y, b, 0x04004000u), scale, 0, v + 8 * k + 1, 4);
    put(signed_pair(point.z, b, 0x02002000u), scale, 0, v + 8 * k + 2, 4);
    put(signed_pair(point.w, b, 0x01001000u), scale, 0, v + 8 * k + 3, 4);
  }
}
"""

IQ2_BYTES = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float, float,
                       const threadgroup uint4* lut) {
  uint a = h ? p.w.z : p.w.x, s = sign_bytes(h ? p.w.w : p.w.y);
  int sum = 0;
  for (int k = 0; k < 4; k++) {
    uint2 g = ((const threadgroup uint2*)lut)[(a >> (8 * k)) & 255u];
    // A bit for each byte that is negative; minus g is its complement plus one.
    uint m = (((s >> (8 * k)) & 15u) * 0x00204081u) & 0x01010101u;
    sum = dot4((g.x ^ (m * 255u)) + m, x[2 * k], sum);
    m = (((s >> (8 * k + 4)) & 15u) * 0x00204081u) & 0x01010101u;
    sum = dot4((g.y ^ (m * 255u)) + m, x[2 * k + 1], sum);
  }
  return float(sum) * scale_of(p, h) * scale;
}
"""
