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
inline uint pick(uint mask, uint a, uint b) { return (a & mask) | (b & ~mask); }
// The signs of points 2 k and 2 k + 1, of 28 bits with seven of each point: bit 7 p + i is that of
// column i of the p-th, and bit 7 p + i + 16 that of column i + 4. The eighth makes their number even.
inline uint sign_pairs(uint b, int k) {
  uint t = b ^ (b << 1) ^ (b << 2);
  t ^= (t << 3) ^ (b << 6);  // bit 7 p + 6 is that of the point's column 7
  uint high = k ? pick(0x04080000u, t >> 1, b >> 2) : pick(0x04080000u, t << 13, b << 12);
  return pick(0xffffu, k ? b >> 14 : b, high);
}
// The scale lies above the signs.
inline float scaled(float d, uint signs) { return d * (0.5f + float(signs >> 28)) * 0.25f; }
inline float scale_of(Pack p, uint h) { return scaled(p.d, h ? p.w.w : p.w.y); }
// A point's pair i with the signs of point p of two.
inline half2 signed_pair(uint g, uint signs, int p, int i) {
  return as_half2(g ^ ((signs << (15 - 7 * p - i)) & 0x80008000u));
}
"""

# A table of whole points has BANKS copies, side by side; each lane is given the beginning of its own.
IQ2_DOT = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float, float,
                       const threadgroup uint4* lut) {
  uint a = h ? p.w.z : p.w.x, b = h ? p.w.w : p.w.y;
  pair sum = make_pair(0, 0);
  for (int k = 0; k < 4; k++) {
    uint4 g = lut[((a >> (8 * k)) & 255u) * BANKS];
    uint s = sign_pairs(b, k / 2);
    sum = mad(signed_pair(g.x, s, k % 2, 0), x[4 * k], sum);
    sum = mad(signed_pair(g.y, s, k % 2, 1), x[4 * k + 1], sum);
    sum = mad(signed_pair(g.z, s, k % 2, 2), x[4 * k + 2], sum);
    sum = mad(signed_pair(g.w, s, k % 2, 3), x[4 * k + 3], sum);
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
inline void eight(Group group, int j, thread float* v, const threadgroup uint4* lut) {
  float scale = scaled(float(group.d), group.w.y);
  uint4 point = lut[(group.w.x >> (8 * j)) & 255u];
  uint s = sign_pairs(group.w.y, j / 2);
  put(signed_pair(point.x, s, j % 2, 0), scale, 0, v, 4);
  put(signed_pair(point.y, s, j % 2, 1), scale, 0, v + 1, 4);
  put(signed_pair(point.z, s, j % 2, 2), scale, 0, v + 2, 4);
  put(signed_pair(point.w, s, j % 2, 3), scale, 0, v + 3, 4);
}
"""

IQ2_BYTES = """
// Signs of 32 columns, a byte for eight: the eighth makes their number even.
inline uint sign_bytes(uint b) {
  uint s = (b & 0x7fu) | ((b & 0x3f80u) << 1) | ((b & 0x1fc000u) << 2) | ((b & 0xfe00000u) << 3);
  uint t = s ^ (s >> 4);
  t ^= t >> 2;
  t ^= t >> 1;
  return s | ((t & 0x01010101u) << 7);
}
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float, float,
                       const threadgroup uint4* lut) {
  uint a = h ? p.w.z : p.w.x, s = sign_bytes(h ? p.w.w : p.w.y);
  int sum = 0;
  for (int k = 0; k < 4; k++) {
    uint4 g = lut[((a >> (8 * k)) & 255u) * BANKS];
    // A bit for each byte that is negative; minus g is its complement plus one.
    uint m = (((s >> (8 * k)) & 15u) * 0x00204081u) & 0x01010101u;
    sum = dot4((g.x ^ (m * 255u)) + m, x[2 * k], sum);
    m = (((s >> (8 * k + 4)) & 15u) * 0x00204081u) & 0x01010101u;
    sum = dot4((g.y ^ (m * 255u)) + m, x[2 * k + 1], sum);
  }
  return float(sum) * scale_of(p, h) * scale;
}
"""
