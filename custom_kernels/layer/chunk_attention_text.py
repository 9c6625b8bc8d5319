"""The text of the core attention of many tokens: a threadgroup has HEADS heads of one token.

It goes through the token's rows, BLOCK of them at a time: unpacks them into threadgroup memory as the
activations' type; multiplies tiles of 16 heads by STEP rows (`chunk_attention_tiles.py`), of which a
SIMD-group has TILES, or a part of their channels where there are more SIMD-groups than tiles; keeps the
running softmax; and adds the weighted rows to the sums, of which a SIMD-group keeps its channels, of all
heads, in registers.
"""

GROUPS = 8  # SIMD-groups of a threadgroup

# Where row n of a token lies: twice its number in the window, or one more than twice that among the
# compressed rows; -1: it is not there, or not seen.
HEADER = """
template <int CHOSEN>
inline int lies_at(uint n, uint near, int first, uint visible, const device int* chosen) {
  if (n < near) return 2 * (first + int(n));
  uint j = n - near;
  if (CHOSEN) {
    int named = int(j) < CHOSEN ? chosen[j] : -1;
    j = named < 0 ? visible : uint(named);
  }
  return j < visible ? int(2 * j + 1) : -1;
}
"""

BODY = """
    const uint LDK = WIDTH + PAD, LDS = BLOCK + 4, LDP = BLOCK + PAD;
    const uint ACROSS = WIDTH / 128, EACH = HEADS / 8, LANES = (BLOCK + 31) / 32;
    threadgroup uint4 words[BYTES / 16];
    threadgroup element* keys = (threadgroup element*)words;
    threadgroup float* scores = (threadgroup float*)(keys + BLOCK * LDK);
    threadgroup element* weights = (threadgroup element*)(scores + SPLIT * HEADS * LDS);
    threadgroup float* factors = (threadgroup float*)(weights + HEADS * LDP);
    threadgroup int* lies = (threadgroup int*)(factors + HEADS);
    uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    uint id = 32 * sg + lane, token = threadgroup_position_in_grid.x;
    uint first = threadgroup_position_in_grid.y * HEADS;
    int p = place[0] + int(token), low = max(0, p - BEFORE);
    uint near = uint(p + 1 - low), visible = RATIO ? uint(p + 1) / max(RATIO, 1) : 0;
    uint all = near + (CHOSEN ? uint(CHOSEN) : visible);
    low -= place[1];
    const device int* own = (const device int*)chosen + token * CHOSEN;
    const device element* query = q + (token * HELD + first) * WIDTH;
#if QUERIES
    threadgroup element* queries = (threadgroup element*)(lies + 2 * BLOCK);
    threadgroup uint* staged = (threadgroup uint*)(queries + HEADS * LDK);
    for (uint i = 8 * id; i < HEADS * WIDTH; i += 2048)
        copy8(queries + i / WIDTH * LDK + i % WIDTH, query + i);
#else
    const device element* queries = query;
#endif
    TileC sums[HEADS / 16][ACROSS];
    #pragma unroll
    for (uint t = 0; t < HEADS / 16; t++) {
        #pragma unroll
        for (uint j = 0; j < ACROSS; j++) zero(sums[t][j]);
    }
    float most[EACH], sum[EACH];
    #pragma unroll
    for (uint i = 0; i < EACH; i++) { most[i] = -1e30f; sum[i] = 0; }  // lower than any score
    if (id < BLOCK) lies[id] = lies_at<CHOSEN>(id, near, low, visible, own);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage(WORDS, BLOCK, staged, lies, window, rows, id);
    uint across = sg % (BLOCK / STEP), down = sg / (BLOCK / STEP) % (HEADS / 16 / TILES);
    uint part = sg / (BLOCK / STEP * (HEADS / 16 / TILES));
    for (uint from = 0; from < all; from += BLOCK) {
        threadgroup int* here = lies + from / BLOCK % 2 * BLOCK;
        threadgroup int* next = lies + (1 - from / BLOCK % 2) * BLOCK;
        copied();
        threadgroup_barrier(mem_flags::mem_threadgroup);
        #pragma unroll 4
        for (uint i = id; i < BLOCK * WIDTH / 4; i += 256) {
            uint r = i / (WIDTH / 4), c = i % (WIDTH / 4) * 4, raw[4];
            int code = here[r];
            float v[4] = {0};
            if (code >= 0) {
                fetch<CODED, HEAD, T>(ROW_AT(r, code), c, raw);
                unpack<CODED, T>(raw, c, v);
            }
            put_near(keys + r * LDK + c, v);
        }
        if (id < BLOCK) next[id] = lies_at<CHOSEN>(from + BLOCK + id, near, low, visible, own);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (from + BLOCK < all) stage(WORDS, BLOCK, staged, next, window, rows, id);
        TileS score[TILES];
        #pragma unroll
        for (uint t = 0; t < TILES; t++) zero(score[t]);
        #pragma unroll 4
        for (uint k = part * (WIDTH / SPLIT); k < (part + 1) * (WIDTH / SPLIT); k += 16) {
            TileB b;
            load_b(b, keys + across * STEP * LDK + k, lane, LDK);
            #pragma unroll
            for (uint t = 0; t < TILES; t++) {
                TileQ a;
                load_q(a, queries + (down * TILES + t) * 16 * LDQ + k, lane, LDQ);
                mma_scores(score[t], a, b, lane);
            }
        }
        #pragma unroll
        for (uint t = 0; t < TILES; t++)
            store_scores(score[t], scores + (part * HEADS + (down * TILES + t) * 16) * LDS +
                         across * STEP, lane, LDS);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        #pragma unroll
        for (uint i = 0; i < EACH; i++) {
            uint h = sg * EACH + i;
            float v[LANES], top = most[i], total = 0;
            #pragma unroll
            for (uint j = 0; j < LANES; j++) {
                uint r = lane + 32 * j;
                v[j] = r < BLOCK && here[r] >= 0 ? 0.0f : -INFINITY;
                if (r >= BLOCK) continue;
                for (uint s = 0; s < SPLIT; s++)
                    v[j] += scores[(s * HEADS + h) * LDS + r] * as_type<float>(SCALE);
                top = v[j] <= top ? top : v[j];
            }
            top = simd_max(top);
            #pragma unroll
            for (uint j = 0; j < LANES; j++) {
                v[j] = as<T>(exp(v[j] - top));
                total += v[j];
                if (lane + 32 * j < BLOCK)
                    weights[h * LDP + lane + 32 * j] = static_cast<element>(v[j]);
            }
            float keeps = exp(most[i] - top);
            sum[i] = fma(sum[i], keeps, simd_sum(total));
            most[i] = top;
            if (lane == 0) factors[h] = keeps;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        #pragma unroll
        for (uint t = 0; t < HEADS / 16; t++) {
            #pragma unroll
            for (uint j = 0; j < ACROSS; j++) scale_rows(sums[t][j], factors + 16 * t, lane);
        }
        #pragma unroll
        for (uint r = 0; r < BLOCK; r += STEP) {
            TileA a[HEADS / 16];
            #pragma unroll
            for (uint t = 0; t < HEADS / 16; t++) load_a(a[t], weights + 16 * t * LDP + r, lane, LDP);
            #pragma unroll
            for (uint j = 0; j < ACROSS; j++) {
                TileB b;
                load_v(b, keys + r * LDK + (sg * ACROSS + j) * 16, lane, LDK);
                #pragma unroll
                for (uint t = 0; t < HEADS / 16; t++) mma_values(sums[t][j], a[t], b, lane);
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    #pragma unroll
    for (uint i = 0; i < EACH; i++) {
        uint h = sg * EACH + i;
        float bias = sink[min(first + h, uint(H - 1))];
        if (lane == 0) factors[h] = 1.0f / (sum[i] + exp(bias - most[i]));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup float* tile = (threadgroup float*)words + sg * 256;
    #pragma unroll
    for (uint t = 0; t < HEADS / 16; t++) {
        #pragma unroll
        for (uint j = 0; j < ACROSS; j++) {
            store(sums[t][j], tile, lane);
            simdgroup_barrier(mem_flags::mem_threadgroup);
            uint h = 16 * t + lane / 2, c = (sg * ACROSS + j) * 16 + lane % 2 * 8;
            float v[8];
            #pragma unroll
            for (uint n = 0; n < 8; n++) v[n] = as<T>(tile[8 * lane + n] * factors[h]);
            #pragma unroll
            for (uint n = 0; n < 8; n += 2) {
                int at = int(c + n) - (WIDTH - ROPE);
                if (at < 0) continue;
                uint pair = token * (ROPE / 2) + uint(at) / 2;
                float co = cosines[pair], si = sines[pair], a = v[n];
                v[n] = as<T>(a * co + v[n + 1] * si);
                v[n + 1] = as<T>(v[n + 1] * co - a * si);
            }
            if (first + h < H) put_out(out + (token * H + first + h) * WIDTH + c, v);
            simdgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
"""
