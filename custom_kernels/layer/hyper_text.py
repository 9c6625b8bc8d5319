"""Text that the kernels around a sublayer have in common: loads, stores, and the collapse of streams.

A collapse is one threadgroup's work for a token: it sums the partial mixes, weighs the streams by
them, and norms what they give. Its threads ask for the streams before the mixes are known.
"""

GROUPS = 16  # SIMD-groups of a threadgroup that collapses; of 32, there are too few registers
SUMMING = 8  # those of them that sum partial mixes: each reads the sums of all of these
CHANNELS = 8 * 32 * GROUPS  # of a pass of all threads
MOST_WIDTH = 2 * CHANNELS  # whose streams fit into the registers

# Four or eight values as the activations' type, by one store or two.
STORES = """
inline uint pair_of(float a, float b) {
  return uint(as_type<ushort>(static_cast<bfloat16_t>(a))) |
      uint(as_type<ushort>(static_cast<bfloat16_t>(b))) << 16;
}
inline void store4(device float* p, thread const float* v) {
  float4 q;
  q.x = v[0]; q.y = v[1]; q.z = v[2]; q.w = v[3];
  *(device float4*)p = q;
}
inline void store4(device bfloat16_t* p, thread const float* v) {
  uint2 q;
  q.x = pair_of(v[0], v[1]); q.y = pair_of(v[2], v[3]);
  *(device uint2*)p = q;
}
"""

SIGMOID = """
inline float sigmoid(float v) { return 1.0f / (1.0f + exp(-v)); }
"""

# Afterwards lane m of every SIMD-group has mix m, normed; that of the squares is used up.
MIXES = """
    threadgroup float parts[SUMMING * 32];
    threadgroup float squares[GROUPS];
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    uint id = thread_index_in_threadgroup, token = threadgroup_position_in_grid.y;
    float eps = as_type<float>(EPS), norm_eps = as_type<float>(NORM_EPS);
    if (group < SUMMING) {
        float sum = 0;
        if (lane <= ROWS)
            #pragma unroll
            for (uint s = group; s < SLICES; s += SUMMING)
                sum += partial[(token * SLICES + s) * (ROWS + 1) + lane];
        parts[32 * group + lane] = sum;
    }
    float x[32 * PASSES] = {0};
    float w[8 * PASSES] = {0};
    if (threadgroup_position_in_grid.x == 0) {
        #pragma unroll
        for (uint i = 0; i < PASSES; i++) {
            uint c = 8 * (i * 32 * GROUPS + id);
            if (c < WIDTH) {
                #pragma unroll
                for (uint j = 0; j < 4; j++)
                    load8(streams + (token * 4 + j) * WIDTH + c, x + 32 * i + 8 * j);
                load8(weight + c, w + 8 * i);
            }
        }
    }
    float pre_scale = scale[0], pre_base = base[lane & 3];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float mix = 0;
    #pragma unroll
    for (uint s = 0; s < SUMMING; s++) mix += parts[32 * s + lane];
    mix *= 1.0f / sqrt(simd_shuffle(mix, ROWS) / float(4 * WIDTH) + norm_eps);
"""

COLLAPSE = """
    float own = sigmoid(mix * pre_scale + pre_base) + eps, square = 0;
    float pre[4], y[8 * PASSES];
    #pragma unroll
    for (uint j = 0; j < 4; j++) pre[j] = simd_shuffle(own, j);
    #pragma unroll
    for (uint e = 0; e < 8 * PASSES; e++) {
        float v = 0;
        #pragma unroll
        for (uint j = 0; j < 4; j++) v = fma(pre[j], x[e / 8 * 32 + 8 * j + e % 8], v);
        y[e] = float(static_cast<T>(v));
        square = fma(y[e], y[e], square);
    }
    square = simd_sum(square);
    if (lane == 0) squares[group] = square;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    square = simd_sum(lane < GROUPS ? squares[lane] : 0.0f);
    float norm = 1.0f / sqrt(square / float(WIDTH) + norm_eps);
    #pragma unroll
    for (uint i = 0; i < PASSES; i++) {
        uint c = 8 * (i * 32 * GROUPS + id);
        #pragma unroll
        for (uint t = 0; t < 8; t++) y[8 * i + t] = y[8 * i + t] * norm * w[8 * i + t];
        if (c < WIDTH) {
            store4(out + token * WIDTH + c, y + 8 * i);
            store4(out + token * WIDTH + c + 4, y + 8 * i + 4);
        }
    }
"""
