"""How each format's codes become numbers inside a kernel: a chunk of 64 columns at a time.

A Pack is what one lane loads of one row: 16-byte words of codes and their scales. `dot_group` is the
product of 32 of its columns with a staged group; codes are made half2 exactly, two at a time, by
placing their bits in a half's mantissa. `values` are the same 32 numbers in float, for tiles.
"""

from dataclasses import dataclass

# Bits 0..9 of 0x6400 count ones: a code ORed into them is 1024 + code.
_IQ2 = """
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
inline float scale_of(Pack p, uint h) {
  return p.d * (0.5f + float((h ? p.w.w : p.w.y) >> 28)) * 0.25f;
}
// Pair i of grid point k with its signs, as bits of a half2.
inline half2 signed_pair(uint g, uint signs, uint spread) {
  return as_half2(g ^ ((signs * spread) & 0x80008000u));
}
"""

_IQ2_DOT = """
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

_IQ2_VALUES = """
inline void values(Pack p, uint h, thread float* v, const threadgroup uint4* lut) {
  uint a = h ? p.w.z : p.w.x, s = sign_bytes(h ? p.w.w : p.w.y);
  float scale = scale_of(p, h);
  for (int k = 0; k < 4; k++) {
    uint4 g = lut[(a >> (8 * k)) & 255u];
    uint b = (s >> (8 * k)) & 255u;
    put(signed_pair(g.x, b, 0x08008000u), scale, 0, v + 8 * k, 4);
    put(signed_pair(g.y, b, 0x04004000u), scale, 0, v + 8 * k + 1, 4);
    put(signed_pair(g.z, b, 0x02002000u), scale, 0, v + 8 * k + 2, 4);
    put(signed_pair(g.w, b, 0x01001000u), scale, 0, v + 8 * k + 3, 4);
  }
}
"""

_Q2_K = """
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
"""

_Q2_K_DOT = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float sum0, float sum1,
                       const threadgroup uint4*) {
  float result = 0;
  for (int s = 0; s < 2; s++) {
    uint w = h ? (s ? p.w.w : p.w.z) : (s ? p.w.y : p.w.x);
    uint byte = (p.scales >> (16 * h + 8 * s)) & 255u;
    pair sum = make_pair(0, 0);
    for (int i = 0; i < 8; i++) sum = mad(codes(w, i), x[8 * s + i], sum);
    result = fma(low(as_half2(p.d)) * float(byte & 15u) * scale, total(sum), result);
    result = fma(-high(as_half2(p.d)) * float(byte >> 4), s ? sum1 : sum0, result);
  }
  return result;
}
"""

_Q2_K_VALUES = """
inline void values(Pack p, uint h, thread float* v, const threadgroup uint4*) {
  for (int s = 0; s < 2; s++) {
    uint w = h ? (s ? p.w.w : p.w.z) : (s ? p.w.y : p.w.x);
    uint byte = (p.scales >> (16 * h + 8 * s)) & 255u;
    float d = low(as_half2(p.d)) * float(byte & 15u);
    float least = -high(as_half2(p.d)) * float(byte >> 4);
    for (int i = 0; i < 8; i++) put(codes(w, i), d, least, v + 16 * s + i, 8);
  }
}
"""

_Q4_K = """
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

_Q4_K_DOT = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float sum0, float sum1,
                       const threadgroup uint4*) {
  pair sum = make_pair(0, 0);
  for (int i = 0; i < 16; i++) sum = mad(codes(word(p, h, i / 4), i % 4), x[i], sum);
  float s = float((p.scales >> (8 * h)) & 255u), m = float((p.mins >> (8 * h)) & 255u);
  return low(as_half2(p.d)) * s * scale * total(sum) - high(as_half2(p.d)) * m * (sum0 + sum1);
}
"""

_Q4_K_VALUES = """
inline void values(Pack p, uint h, thread float* v, const threadgroup uint4*) {
  float s = low(as_half2(p.d)) * float((p.scales >> (8 * h)) & 255u);
  float least = -high(as_half2(p.d)) * float((p.mins >> (8 * h)) & 255u);
  for (int i = 0; i < 16; i++)
    put(codes(word(p, h, i / 4), i % 4), s, least, v + i / 4 * 8 + i % 4, 4);
}
"""

_MXFP4 = """
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
inline float scale_of(Pack p, uint h) {
  uint e = (p.scales >> (8 * h)) & 255u;
  return as_type<float>(e ? e << 23 : 0x00400000u);
}
"""

_MXFP4_DOT = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float, float,
                       const threadgroup uint4*) {
  pair sum = make_pair(0, 0);
  for (int i = 0; i < 16; i++) sum = mad(codes(word(p, h, i / 4), i % 4), x[i], sum);
  return total(sum) * (16384.0f * scale) * scale_of(p, h);
}
"""

_MXFP4_VALUES = """
inline void values(Pack p, uint h, thread float* v, const threadgroup uint4*) {
  float scale = scale_of(p, h);
  for (int i = 0; i < 16; i++) {
    thread float* at = v + i / 4 * 8 + i % 4;
    put(codes(word(p, h, i / 4), i % 4), 16384.0f, 0, at, 4);
    at[0] *= scale;
    at[4] *= scale;
  }
}
"""

_Q8_0 = """
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

_Q8_0_DOT = """
inline float dot_group(Pack p, uint h, const thread pair* x, float scale, float, float,
                       const threadgroup uint4*) {
  pair sum = make_pair(0, 0);
  for (int i = 0; i < 16; i++) sum = mad(codes(word(p, h, i / 2), i % 2), x[i], sum);
  return total(sum) * scale_of(p, h) * scale;
}
"""

_Q8_0_VALUES = """
inline void values(Pack p, uint h, thread float* v, const threadgroup uint4*) {
  for (int i = 0; i < 16; i++)
    put(codes(word(p, h, i / 2), i % 2), scale_of(p, h), 0, v + i / 2 * 4 + i % 2, 2);
}
"""

# A pair of codes as two of 32 columns, `apart` of each other.
_PUT = """
inline void put(half2 code, float scale, float least, thread float* v, int apart) {
  v[0] = fma(low(code), scale, least);
  v[apart] = fma(high(code), scale, least);
}
"""


@dataclass(frozen=True)
class Packing:
    """A format's text, its planes in the order of `load_pack`, and how its codes pair."""

    planes: tuple[str, ...]
    pairing: str
    largest: int  # of the staged activations: 16 products of it and a code stay finite in half
    loading: str
    dot: str
    values: str
    lut: bool = False

    @property
    def products(self) -> str:
        """Text for kernels that multiply a chunk with staged activations."""
        return self.loading + self.dot

    @property
    def decoding(self) -> str:
        """Text for kernels that decode into tiles."""
        return self.loading + _PUT + self.values

    def names(self, matrix: str) -> list[str]:
        """The kernel's inputs that hold a matrix."""
        return [f"{matrix}_{plane}" for plane in self.planes]


PACKINGS = {
    "iq2_xxs": Packing(("weight", "d"), "8", 64, _IQ2, _IQ2_DOT, _IQ2_VALUES, lut=True),
    "q2_k": Packing(("weight", "scales", "d"), "16", 256, _Q2_K, _Q2_K_DOT, _Q2_K_VALUES),
    "q4_k": Packing(("weight", "scales", "d"), "8", 64, _Q4_K, _Q4_K_DOT, _Q4_K_VALUES),
    "mxfp4": Packing(("weight", "scales"), "8", 2048, _MXFP4, _MXFP4_DOT, _MXFP4_VALUES),
    "q8_0": Packing(("weight", "d"), "4", 16, _Q8_0, _Q8_0_DOT, _Q8_0_VALUES),
}
