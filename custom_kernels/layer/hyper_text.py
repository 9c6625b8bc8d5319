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

# Eight channels as they are stored, until they are wanted: so they take half the registers.
EIGHT = """
template <typename T> struct Eight {
  uint4 words[sizeof(T) / 2];
  inline void load(const device T* p) {
    #pragma unroll
    for (uint i = 0; i < sizeof(T) / 2; i++) words[i] = ((const device uint4*)p)[i];
  }
  inline void values(thread float* v) const {
    if (sizeof(T) == 2) {
      two(words[0].x, v); two(words[0].y, v + 2); two(words[0].z, v + 4); two(words[0].w, v + 6);
    } else {
      #pragma unroll
      for (uint i = 0; i < sizeof(T) / 2; i++) {
        v[4 * i] = as_type<float>(words[i].x); v[4 * i + 1] = as_type<float>(words[i].y);
        v[4 * i + 2] = as_type<float>(words[i].z); v[4 * i + 3] = as_type<float>(words[i].w);
      }
    }
  }
};
"""

SIGMOID = """
inline float sigmoid(float v) { return 1.0f / (1.0f + exp(-v)); }
"""

# `collapses`: whether the threadgroup collapses the streams of a token.
LOADS = """
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
    Eight<T> x[4 * PASSES];
    float w[8 * PASSES] = {0};
    if (collapses) {
        #pragma unroll
        for (uint i = 0; i < PASSES; i++) {
            uint c = 8 * (i * 32 * GROUPS + id);
            #pragma unroll
            for (uint j = 0; j < 4; j++)
                x[4 * i + j].load(streams + (token * 4 + j) * WIDTH + min(c, uint(WIDTH - 8)));
            if (c < WIDTH) load8(weight + c, w + 8 * i);
        }
    }
    float pre_scale = scale[0], pre_base = base[lane & 3];
"""

# Afterwards lane m of every SIMD-group has mix m, normed; that of the squares is used up.
MIXES = """
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float mix = 0;
    #pragma unroll
    for (uint s = 0; s < SUMMING; s++) mix += parts[32 * s + lane];
    mix *= 1.0f / sqrt(simd_shuffle(mix, ROWS) / float(4 * WIDTH) + norm_eps);
"""

# Afterwards a thread has eight channels of every pass, normed, in `y`.
COLLAPSE = """
    float own = sigmoid(mix * pre_scale + pre_base) + eps, square = 0;
    float pre[4], y[8 * PASSES];
    #pragma unroll
    for (uint j = 0; j < 4; j++) pre[j] = simd_shuffle(own, j);
    #pragma unroll
    for (uint i = 0; i < PASSES; i++) {
        float v[8] = {0};
        #pragma unroll
        for (uint j = 0; j < 4; j++) {
            float own[8];
            x[4 * i + j].values(own);
            #pragma unroll
            for (uint t = 0; t < 8; t++) v[t] = fma(pre[j], own[t], v[t]);
        }
        bool inside = 8 * (i * 32 * GROUPS + id) < WIDTH;
        #pragma unroll
        for (uint t = 0; t < 8; t++) {
            y[8 * i + t] = inside ? float(static_cast<T>(v[t])) : 0.0f;
            square = fma(y[8 * i + t], y[8 * i + t], square);
        }
    }
    square = simd_sum(square);
    if (lane == 0) squares[group] = square;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    square = simd_sum(lane < GROUPS ? squares[lane] : 0.0f);
    float norm = 1.0f / sqrt(square / float(WIDTH) + norm_eps);
    #pragma unroll
    for (uint i = 0; i < PASSES; i++) {
        #pragma unroll
        for (uint t = 0; t < 8; t++) y[8 * i + t] = y[8 * i + t] * norm * w[8 * i + t];
    }
"""

STORE = """
    #pragma unroll
    for (uint i = 0; i < PASSES; i++) {
        uint c = 8 * (i * 32 * GROUPS + id);
        if (c < WIDTH) {
            store4(out + token * WIDTH + c, y + 8 * i);
            store4(out + token * WIDTH + c + 4, y + 8 * i + 4);
        }
    }
"""
