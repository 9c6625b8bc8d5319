"""The texts of the kernels that score the indexer's rows, coded or plain.

Every threadgroup makes its token's queries for itself: rotary turn and, where rows are coded, Hadamard
transform and E2M1 codes. A thread then keeps rows and goes through the heads. Code that runs once
waits for its own instructions, so heads are a loop.
"""

from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer.buffers import numbered, picked, variant
from ds4mlx.custom_kernels.words import LOAD8

# Where there are few rows, many SIMD-groups share the heads of the same 32.
_BEGIN = """
    uint sequence = threadgroup_position_in_grid.y, rows = 0;
PICKED
    const device ROW* tail = (const device ROW*)(tails + ROWS_AT);
    const device int* place = places + 8 * sequence;
    const device float* q = products + uint(place[4]) * ALL + QUERIES_AT;
    const device float* weights = projections + uint(place[4]) * ALL_PROJECTED + WEIGHTS_AT;
    const device float* angles = turns + uint(place[4]) * (4 * ROPE);
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    uint id = 32 * group + lane, grid = threadgroups_per_grid.x;
    uint visible = uint(place[0] + 1) / RATIO, settled = uint(place[2]);
    uint shift = LOG_GROUPS;  // of them 1 << shift share the heads of a row
    while (shift > LEAST && visible << shift > grid * KEPT * (32 * GROUPS)) shift--;
    uint place_in_grid = threadgroup_position_in_grid.x;
COUNTED
    device float* scores = all_scores + sequence * rows;
    for (uint i = visible + place_in_grid * 32 * GROUPS + id; i < rows; i += grid * 32 * GROUPS)
        scores[i] = -INFINITY;
    uint chunk = (32 * KEPT * GROUPS) >> shift, first = place_in_grid * chunk;
    if (first >= visible) return;
"""

# A SIMD-group's rows lie side by side: its first 32, one a lane, and so on.
_ROWS = """
    for (uint at = first; at < visible; at += grid * chunk) {
        float sum[KEPT] = {0};
        uint j0 = at + (group >> shift) * (32 * KEPT) + lane;
"""

_ADD = """
        #pragma unroll
        for (uint r = 0; r < KEPT; r++) sums[(group * KEPT + r) * 32 + lane] = sum[r];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = id; i < min(chunk, visible - at); i += 32 * GROUPS) {
            float total = BEFORE;
            uint from = (i / (32 * KEPT) << shift) * (32 * KEPT) + i % (32 * KEPT);
            for (uint s = 0; s < 1u << shift; s++) total += sums[from + s * (32 * KEPT)];
            scores[at + i] = total;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
"""

ROW_AT = """
#define ROW_AT(j) ((j) < settled ? full + (j) * ELEMENTS : tail + ((j) - settled) * ELEMENTS)
"""

CODED_HEADER = """
#define BEFORE 0.0f
"""

# Twice the values of eight E2M1 codes, as bytes: in words of channels 0, 2, 4, 6 and of 1, 3, 5, 7.
METAL_DOUBLED = """
inline uint doubled(uint c) {
  uint high = (c >> 2) & 0x01010101u, low = c & 0x03030303u, masked = high * 3u & low;
  uint size = (high << 2) + low + masked + ((masked & (masked >> 1) & 0x01010101u) << 1);
  uint minus = (c >> 3) & (high | low | (low >> 1)) & 0x01010101u;
  return (size ^ (minus * 255u)) + minus;
}
inline void doubled(uint w, thread uint* k) {
  k[0] = doubled(w & 0x0f0f0f0fu);
  k[1] = doubled((w >> 4) & 0x0f0f0f0fu);
}
"""
# Bytes are looked up by the 3 bits of a size, and picked by signs that fill a byte.
CUDA_DOUBLED = """
inline uint permuted(uint a, uint b, uint at) {
  uint d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(at));
  return d;
}
inline uint doubled(uint size, uint sign) {
  uint plus = permuted(0x03020100u, 0x0c080604u, size), minus = permuted(0xfdfeff00u, 0xf4f8fafcu, size);
  uint mask = permuted(sign, 0u, 0xba98u);
  return (plus & ~mask) | (minus & mask);
}
inline void doubled(uint w, uint* k) {
  uint even = w & 0x07070707u, odd = w >> 4 & 0x07070707u;
  k[0] = doubled(permuted(even | even >> 4, 0u, 0x4420u), w << 4);
  k[1] = doubled(permuted(odd | odd >> 4, 0u, 0x4420u), w);
}
"""

_CODED_QUERIES = """
    threadgroup uint4 codes[HEADS * WIDTH / 16];
    threadgroup float scales[HEADS * PARTS];
    threadgroup float shares[HEADS];
    threadgroup float sums[32 * KEPT * GROUPS];
    threadgroup char* bytes = (threadgroup char*)codes;
    float turn[EACH], cross[EACH];
    #pragma unroll
    for (uint i = 0; i < EACH; i++) {
        uint c = EACH * lane + i, k = c < WIDTH - ROPE ? 0 : (c - (WIDTH - ROPE)) / 2;
        turn[i] = angles[ROPE + k];
        cross[i] = angles[ROPE + ROPE / 2 + k];
    }
    #pragma unroll 1
    for (uint h = group; h < HEADS; h += GROUPS) {
        float v[EACH], as_is[EACH];
        #pragma unroll
        for (uint i = 0; i < EACH; i++)
            as_is[i] = float(static_cast<T>(q[h * WIDTH + EACH * lane + i]));
        #pragma unroll
        for (uint i = 0; i < EACH; i++) {
            float mate = EACH > 1 ? as_is[(i ^ 1) % EACH] : simd_shuffle_xor(as_is[i], 1);
            uint c = EACH * lane + i;
            float turned = as_is[i] * turn[i] + (c & 1 ? mate : -mate) * cross[i];
            v[i] = c < WIDTH - ROPE ? as_is[i] : float(static_cast<T>(turned));
        }
        // As MLX does on a GPU, which rounds after every sixteenfold step.
        #pragma unroll
        for (uint b = 1; b < EACH; b *= 2) {
            float u[EACH];
            #pragma unroll
            for (uint i = 0; i < EACH; i++) u[i] = i & b ? v[(i ^ b) % EACH] - v[i] : v[i] + v[(i ^ b) % EACH];
            #pragma unroll
            for (uint i = 0; i < EACH; i++) v[i] = u[i];
        }
        #pragma unroll 1
        for (uint b = 1; b < 32; b *= 2) {
            float sign = lane & b ? -1.0f : 1.0f;
            bool rounds = b * EACH == 8 || b * EACH == 128 || b == 16;
            #pragma unroll
            for (uint i = 0; i < EACH; i++) {
                float u = fma(v[i], sign, simd_shuffle_xor(v[i], b));
                v[i] = rounds ? float(static_cast<T>(u)) : u;
            }
        }
        float most = 0;
        #pragma unroll
        for (uint i = 0; i < EACH; i++) {
            v[i] = float(static_cast<T>(v[i] * as_type<float>(ROOT)));
            most = fabs(v[i]) < INFINITY ? max(most, fabs(v[i])) : INFINITY;
        }
        #pragma unroll
        for (uint m = 1; m < 32 / EACH; m *= 2) most = max(most, simd_shuffle_xor(most, m));
        bool finite = most < INFINITY;
        uint u = as_type<uint>(max(most, 6 * as_type<float>(0x00800000u)) / 6.0f);
        uint exponent = finite ? (u >> 23) + ((u & 0x7fffffu) != 0) : 1u;
        #pragma unroll
        for (uint i = 0; i < EACH; i++) {
            float size = fabs(v[i]) * as_type<float>((254u - exponent) << 23);
            float fine = size < 2 ? 2.0f : size < 4 ? 1.0f : 0.5f;
            int n = finite ? int(rint(size * fine) * (size < 2 ? 1.0f : size < 4 ? 2.0f : 4.0f)) : 0;
            uint c = EACH * lane + i;
            bytes[h * WIDTH + c / 8 * 8 + c % 2 * 4 + c % 8 / 2] = char(v[i] < 0 ? -n : n);
        }
        if (EACH * lane % 32 == 0)
            scales[h * PARTS + EACH * lane / 32] =
                as_type<float>(finite ? exponent << 23 : 0x7fc00000u);
        if (lane == 0) shares[h] = weights[h] * as_type<float>(SHARE) * 0.25f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint many = (HEADS + (1u << shift) - 1) >> shift, h0 = (group & ((1u << shift) - 1)) * many;
    uint h1 = min(h0 + many, uint(HEADS));
"""

CODED = (
    _BEGIN
    + _CODED_QUERIES
    + _ROWS
    + """
        uint k[KEPT][WIDTH / 4];
        float powers[KEPT][PARTS];
        #pragma unroll
        for (uint r = 0; r < KEPT; r++) {
            const device ROW* row = ROW_AT(min(j0 + 32 * r, visible - 1));
            #pragma unroll
            for (uint i = 0; i < WIDTH / 8; i++) {
                doubled(row[i], k[r] + 2 * i);
            }
            #pragma unroll
            for (uint s = 0; s < PARTS; s++) {
                uint exponent = row[WIDTH / 8 + s / 4] >> (8 * (s % 4)) & 255u;
                powers[r][s] = as_type<float>(exponent << 23);
            }
        }
        #pragma unroll 1
        for (uint h = h0; h < h1; h++) {
            float product[KEPT] = {0};
            #pragma unroll
            for (uint s = 0; s < PARTS; s++) {
                int n[KEPT] = {0};
                #pragma unroll
                for (uint i = 0; i < 2; i++) {
                    uint4 c = codes[h * (WIDTH / 16) + 2 * s + i];
                    #pragma unroll
                    for (uint r = 0; r < KEPT; r++) {
                        n[r] = dot4(c.x, k[r][8 * s + 4 * i], n[r]);
                        n[r] = dot4(c.y, k[r][8 * s + 4 * i + 1], n[r]);
                        n[r] = dot4(c.z, k[r][8 * s + 4 * i + 2], n[r]);
                        n[r] = dot4(c.w, k[r][8 * s + 4 * i + 3], n[r]);
                    }
                }
                #pragma unroll
                for (uint r = 0; r < KEPT; r++)
                    product[r] = fma(float(n[r]) * scales[h * PARTS + s], powers[r][s], product[r]);
            }
            #pragma unroll
            for (uint r = 0; r < KEPT; r++)
                sum[r] = fma(product[r] < 0 ? 0.0f : product[r], shares[h], sum[r]);
        }
"""
    + _ADD
)

PLAIN = (
    _BEGIN
    + """
    threadgroup float4 queries[BLOCK * WIDTH / 4];
    threadgroup float sums[32 * KEPT * GROUPS];
    threadgroup float* made = (threadgroup float*)queries;
    for (uint head = 0; head < HEADS; head += BLOCK) {
    uint heads = min(uint(HEADS) - head, uint(BLOCK));
    for (uint i = id; i < heads * WIDTH; i += 32 * GROUPS) {
        uint c = i % WIDTH, k = c < WIDTH - ROPE ? 0 : (c - (WIDTH - ROPE)) / 2;
        const device float* v = q + head * WIDTH + (i & ~1u);
        float a = float(static_cast<T>(v[0])), b = float(static_cast<T>(v[1]));
        float turn = angles[ROPE + k], cross = angles[ROPE + ROPE / 2 + k];
        float turned = c & 1 ? a * cross + b * turn : a * turn - b * cross;
        made[i] = c < WIDTH - ROPE ? (c & 1 ? b : a) : float(static_cast<T>(turned));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint many = (heads + (1u << shift) - 1) >> shift, h0 = (group & ((1u << shift) - 1)) * many;
    uint h1 = min(h0 + many, heads);
"""
    + _ROWS
    + """
        const device ROW* row = ROW_AT(min(j0, visible - 1));
        for (uint h = h0; h < h1; h += 2) {
            uint other = min(h + 1, h1 - 1);
            float one = 0, two = 0;
            for (uint c = 0; c < WIDTH; c += 8) {
                float k[8];
                load8(row + c, k);
                #pragma unroll
                for (uint i = 0; i < 2; i++) {
                    float4 a = queries[(h * WIDTH + c) / 4 + i];
                    float4 b = queries[(other * WIDTH + c) / 4 + i];
                    one = fma(a.x, k[4 * i], one); two = fma(b.x, k[4 * i], two);
                    one = fma(a.y, k[4 * i + 1], one); two = fma(b.y, k[4 * i + 1], two);
                    one = fma(a.z, k[4 * i + 2], one); two = fma(b.z, k[4 * i + 2], two);
                    one = fma(a.w, k[4 * i + 3], one); two = fma(b.w, k[4 * i + 3], two);
                }
            }
            float share = as_type<float>(SHARE);
            sum[0] = fma(one < 0 ? 0.0f : one, weights[head + h] * share, sum[0]);
            if (other > h) sum[0] = fma(two < 0 ? 0.0f : two, weights[head + other] * share, sum[0]);
        }
"""
    + _ADD
    + "    }\n"
)
PLAIN_HEADER = "#define BEFORE (head ? scores[at + i] : 0.0f)\n"


def coded_kernel(many: int) -> Kernel:
    """The kernel for rows of E2M1 codes of so many sequences at most."""
    header = ROW_AT + CODED_HEADER
    return _kernel("coded", CODED, header, many, METAL_DOUBLED, CUDA_DOUBLED)


def plain_kernel(many: int) -> Kernel:
    """The kernel for plain rows of so many sequences at most."""
    return _kernel("plain", PLAIN, LOAD8 + ROW_AT + PLAIN_HEADER, many)


def _kernel(
    kind: str, body: str, header: str, many: int, metal: str = "", cuda: str = ""
) -> Kernel:
    inputs = ["products", "projections", "places", "turns", *numbered(["full", "tails"], many)]
    lying = picked(["full"], "ROW", many, "sequence") + picked(["tails"], "uint", many, "sequence")
    body = body.replace("PICKED", lying)
    counts = (f"uint(full{i}_shape[0]) + TAIL" for i in range(many))
    body = body.replace("COUNTED", "".join(f"    rows = max(rows, {count});\n" for count in counts))
    name = variant(f"index_scores_{kind}", many)
    return Kernel(name, inputs, ["all_scores"], body, header, metal=metal, cuda=cuda)
