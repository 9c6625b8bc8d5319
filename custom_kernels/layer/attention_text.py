"""The texts of the core attention: a share of the rows of a token, and the merge of its shares.

A threadgroup of the first has HEADS heads and a share of the rows, a block at a time: it unpacks a block
once, into the activations' type, for all of its heads. A SIMD-group then scores some of the rows for
four heads, keeps the running softmax of one head, and its threads each sum four channels of four heads.
"""

HEADS = 8  # of a threadgroup, which has as many SIMD-groups
SHARES = 32  # that the rows are cut into: the lanes of the merge's SIMD-groups

FOURS = """
template <typename T> inline float as(float v) { return float(static_cast<T>(v)); }
inline void get4(const device float* p, thread float* v) {
  float4 q = *(const device float4*)p;
  v[0] = q.x; v[1] = q.y; v[2] = q.z; v[3] = q.w;
}
inline void put4(device float* p, thread const float* v) {
  float4 q;
  q.x = v[0]; q.y = v[1]; q.z = v[2]; q.w = v[3];
  *(device float4*)p = q;
}
inline void two(uint w, thread float* v) {
  v[0] = as_type<float>(w << 16); v[1] = as_type<float>(w & 0xffff0000u);
}
inline uint both(float a, float b) {
  ushort x = as_type<ushort>(static_cast<bfloat16_t>(a));
  ushort y = as_type<ushort>(static_cast<bfloat16_t>(b));
  return uint(x) | uint(y) << 16;
}
inline void get_near(const threadgroup float* p, thread float* v) {
  float4 q = *(const threadgroup float4*)p;
  v[0] = q.x; v[1] = q.y; v[2] = q.z; v[3] = q.w;
}
inline void get_near(const threadgroup bfloat16_t* p, thread float* v) {
  uint2 q = *(const threadgroup uint2*)p;
  two(q.x, v); two(q.y, v + 2);
}
inline void put_near(threadgroup float* p, thread const float* v) {
  float4 q;
  q.x = v[0]; q.y = v[1]; q.z = v[2]; q.w = v[3];
  *(threadgroup float4*)p = q;
}
inline void put_near(threadgroup bfloat16_t* p, thread const float* v) {
  uint2 q;
  q.x = both(v[0], v[1]); q.y = both(v[2], v[3]);
  *(threadgroup uint2*)p = q;
}
"""

# Four channels of a row from channel c on: codes and their exponent, or numbers of type T.
ROW = """
template <int CODED, int HEAD, typename T>
inline void fetch(const device uint* row, uint c, thread uint* raw) {
  bool coded = int(c) < CODED;
  uint at = coded ? c / 4 : HEAD / 4 + (c - CODED) * uint(sizeof(T)) / 4;
  raw[0] = row[at];
  raw[1] = row[coded ? (CODED + c / 64) / 4 : at + 1];
  if (sizeof(T) == 4 && !coded) { raw[2] = row[at + 2]; raw[3] = row[at + 3]; }
}
template <int CODED, typename T> inline void unpack(thread const uint* raw, uint c, thread float* v) {
  if (int(c) >= CODED) {
    if (sizeof(T) == 2) { two(raw[0], v); two(raw[1], v + 2); }
    else for (int i = 0; i < 4; i++) v[i] = as_type<float>(raw[i]);
    return;
  }
  uint w = raw[0], e = (raw[1] >> (CODED + c / 64) % 4 * 8) & 255u;
  bool nan = (((w & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) != 0;
  float scale = as_type<float>(nan ? 0x7fc00000u : e ? e << 23 : 0x00400000u) * 256.0f;
  half2 even = as_half2(((w << 8) & 0x80008000u) | ((w << 7) & 0x3f803f80u));
  half2 odd = as_half2((w & 0x80008000u) | ((w >> 1) & 0x3f803f80u));
  v[0] = low(even) * scale; v[1] = low(odd) * scale;
  v[2] = high(even) * scale; v[3] = high(odd) * scale;
}
// The sums over all lanes of four values; lane l gets that of value l % 4.
inline float fold4(thread float* v, uint lane) {
  bool upper = (lane & 2u) != 0;
  float a = (upper ? v[2] : v[0]) + simd_shuffle_xor(upper ? v[0] : v[2], 2);
  float b = (upper ? v[3] : v[1]) + simd_shuffle_xor(upper ? v[1] : v[3], 2);
  upper = (lane & 1u) != 0;
  float sum = (upper ? b : a) + simd_shuffle_xor(upper ? a : b, 1);
  sum += simd_shuffle_xor(sum, 4);
  sum += simd_shuffle_xor(sum, 8);
  return sum + simd_shuffle_xor(sum, 16);
}
"""

# The pair v of channels c and c + 1, turned; `way` is -1 to turn it back.
TURN = """
template <typename T>
inline void turn(thread float* v, int c, int rope, const device float* angles, float way) {
  if (c < 0) return;
  float co = angles[c / 2], si = way * angles[rope / 2 + c / 2], a = v[0];
  v[0] = as<T>(a * co - v[1] * si);
  v[1] = as<T>(a * si + v[1] * co);
}
"""

SHARE = """
    threadgroup uint4 query_words[HEADS * WIDTH * SIZE / 16];
    threadgroup uint4 value_words[BLOCK * WIDTH * SIZE / 16];
    threadgroup float4 weight_words[BLOCK * HEADS / 4];
    threadgroup float4 kept_words[HEADS / 4];
    threadgroup float unseen[BLOCK];
    threadgroup T* queries = (threadgroup T*)query_words;
    threadgroup T* values = (threadgroup T*)value_words;
    threadgroup float* weights = (threadgroup float*)weight_words;
    threadgroup float* kept = (threadgroup float*)kept_words;
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    uint share = threadgroup_position_in_grid.x, first = threadgroup_position_in_grid.y * HEADS;
    uint id = 32 * group + lane, column = 4 * (id % (WIDTH / 4)), quad = id / (WIDTH / 4);

    uint sequence = threadgroup_position_in_grid.z;
PICKED
    const device uint* tail = tails + WINDOW_AT;
    const device uint* newer = tails + ROWS_AT;
    const device int* place = places + 8 * sequence;
    const device int* named = chosen + max(place[5], 0) * CHOSEN;
    const device float* q = products + sequence * ALL + QUERIES_AT;
    const device float* angles = turns + sequence * (4 * ROPE);
    device float* sums_of_shares = shares + sequence * (SHARES * H * (WIDTH + 2));
    device float* softmax = sums_of_shares + SHARES * H * WIDTH;
    int p = place[0], settled = place[1], low_ = max(0, p - BEFORE);
    bool selects = CHOSEN && place[5] >= 0;
    uint near = p + 1 - low_, far = selects ? CHOSEN : RATIO ? uint(p + 1) / max(RATIO, 1) : 0;
    int done = place[RATIO == 4 ? 2 : 3];
    uint all = near + far, each = max((all + SHARES - 1) / SHARES, uint(LEAST));
    uint begin = min(share * each, all), end = min(begin + each, all);

    float sums[4][4] = {{0}};
    float most = -1e30f, sum = 0;  // lower than any score
    for (uint from = begin; from < end; from += BLOCK) {
        uint count = min(end - from, uint(BLOCK)), raw[ROWS][CHUNKS][4];
        bool seen[ROWS];
        #pragma unroll
        for (uint i = 0; i < ROWS; i++) {
            uint r = group + HEADS * i, n = from + r;
            seen[i] = r < count;
            if (r >= count) continue;
            const device uint* row;
            if (n < near) {
                int at = low_ + int(n) - settled;
                row = at < 0 ? old + (at + KEEP) * WORDS
                             : tail + at * WORDS;
            } else {
                int j = selects ? named[n - near] : int(n - near);
                seen[i] = j >= 0;
                j = max(j, 0);
                row = j < done ? full + uint(j) * WORDS
                               : newer + (j - done) * WORDS;
            }
            #pragma unroll
            for (uint k = 0; k < CHUNKS; k++)
                fetch<CODED, HEAD, T>(row, 4 * lane + 128 * k, raw[i][k]);
        }
        if (from == begin) {
            const device float* own = q + min(first + group, uint(H - 1)) * WIDTH + 4 * lane;
            float v[CHUNKS][4], squares = 0;
            #pragma unroll
            for (uint k = 0; k < CHUNKS; k++) get4(own + 128 * k, v[k]);
            #pragma unroll
            for (uint k = 0; k < CHUNKS; k++) {
                #pragma unroll
                for (uint i = 0; i < 4; i++) {
                    v[k][i] = as<T>(v[k][i]);
                    squares = fma(v[k][i], v[k][i], squares);
                }
            }
            float norm = 1.0f / sqrt(simd_sum(squares) / float(WIDTH) + as_type<float>(EPS));
            #pragma unroll
            for (uint k = 0; k < CHUNKS; k++) {
                #pragma unroll
                for (uint i = 0; i < 4; i++) v[k][i] = as<T>(v[k][i] * norm);
                int c = int(4 * lane + 128 * k) - (WIDTH - ROPE);
                turn<T>(v[k], c, ROPE, angles + ANGLES * ROPE, 1.0f);
                turn<T>(v[k] + 2, c + 2, ROPE, angles + ANGLES * ROPE, 1.0f);
                put_near(queries + group * WIDTH + 4 * lane + 128 * k, v[k]);
            }
        }
        #pragma unroll
        for (uint i = 0; i < ROWS; i++) {
            uint r = group + HEADS * i;
            if (r >= count) continue;
            #pragma unroll
            for (uint k = 0; k < CHUNKS; k++) {
                float v[4] = {0};
                if (seen[i]) unpack<CODED, T>(raw[i][k], 4 * lane + 128 * k, v);
                put_near(values + r * WIDTH + 4 * lane + 128 * k, v);
            }
            if (lane == 0) unseen[r] = seen[i] ? 0.0f : -INFINITY;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float query[4][WIDTH / 32];
        #pragma unroll
        for (uint h = 0; h < 4; h++) {
            #pragma unroll
            for (uint k = 0; k < CHUNKS; k++)
                get_near(queries + (group % 2 * 4 + h) * WIDTH + 4 * lane + 128 * k,
                         query[h] + 4 * k);
        }
        for (uint r = group / 2; r < count; r += HEADS / 2) {
            float dots[4] = {0};
            #pragma unroll
            for (uint k = 0; k < CHUNKS; k++) {
                float v[4];
                get_near(values + r * WIDTH + 4 * lane + 128 * k, v);
                #pragma unroll
                for (uint i = 0; i < 4; i++) {
                    #pragma unroll
                    for (uint h = 0; h < 4; h++) dots[h] = fma(query[h][4 * k + i], v[i], dots[h]);
                }
            }
            float dot = fold4(dots, lane);
            if (lane < 4)
                weights[r * HEADS + group % 2 * 4 + lane] =
                    dot * as_type<float>(SCALE) + unseen[r];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float score = lane < count ? weights[lane * HEADS + group] : -INFINITY;
        float top = max(most, simd_max(score)), weight = exp(score - top), keeps = exp(most - top);
        sum = fma(sum, keeps, simd_sum(weight));
        most = top;
        if (lane < count) weights[lane * HEADS + group] = weight;
        if (lane == 0) kept[group] = keeps;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (quad < 2) {
            float f[4];
            get_near(kept + 4 * quad, f);
            #pragma unroll
            for (uint h = 0; h < 4; h++) {
                #pragma unroll
                for (uint i = 0; i < 4; i++) sums[h][i] *= f[h];
            }
            #pragma unroll 4
            for (uint r = 0; r < count; r++) {
                float v[4], w[4];
                get_near(values + r * WIDTH + column, v);
                get_near(weights + r * HEADS + 4 * quad, w);
                #pragma unroll
                for (uint h = 0; h < 4; h++) {
                    #pragma unroll
                    for (uint i = 0; i < 4; i++) sums[h][i] = fma(w[h], v[i], sums[h][i]);
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (lane == 0 && first + group < H) {
        softmax[((first + group) * SHARES + share) * 2] = most;
        softmax[((first + group) * SHARES + share) * 2 + 1] = sum;
    }
    #pragma unroll
    for (uint h = 0; h < 4; h++) {
        uint mine = first + 4 * quad + h;
        if (quad < 2 && mine < H) put4(sums_of_shares + (share * H + mine) * WIDTH + column, sums[h]);
    }
"""

MERGE = """
    threadgroup float4 sum_words[4 * 32];
    threadgroup float* sums = (threadgroup float*)sum_words;
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    uint h = threadgroup_position_in_grid.x, c = threadgroup_position_in_grid.y * 128 + 4 * lane;
    uint token = threadgroup_position_in_grid.z;
    const device float* parts = shares + token * (SHARES * H * (WIDTH + 2));
    const device float* softmax = parts + SHARES * H * WIDTH;
    const device float* angles = turns + token * (4 * ROPE);
    float most = softmax[(h * SHARES + lane) * 2], sum = softmax[(h * SHARES + lane) * 2 + 1];
    float bias = sink[h], top = max(simd_max(most), bias), weight = exp(most - top);
    float total = simd_sum(weight * sum) + exp(bias - top);
    float v[SHARES / 4][4] = {{0}}, out4[4] = {0};
    #pragma unroll
    for (uint i = 0; i < SHARES / 4; i++) {
        uint s = group + 4 * i;
        if (simd_shuffle(sum, s) != 0) get4(parts + (s * H + h) * WIDTH + c, v[i]);
    }
    #pragma unroll
    for (uint i = 0; i < SHARES / 4; i++) {
        float w = simd_shuffle(weight, group + 4 * i);
        #pragma unroll
        for (uint k = 0; k < 4; k++) out4[k] = fma(w, v[i][k], out4[k]);
    }
    put_near(sums + 128 * group + 4 * lane, out4);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group > 0) return;
    #pragma unroll
    for (uint k = 0; k < 4; k++) {
        for (uint g = 1; g < 4; g++) out4[k] += sums[128 * g + 4 * lane + k];
        out4[k] = as<T>(out4[k] / total);
    }
    int at = int(c) - (WIDTH - ROPE);
    turn<T>(out4, at, ROPE, angles + ANGLES * ROPE, -1.0f);
    turn<T>(out4 + 2, at + 2, ROPE, angles + ANGLES * ROPE, -1.0f);
    for (uint k = 0; k < 4; k++) out[(token * H + h) * WIDTH + c + k] = static_cast<T>(out4[k]);
"""
