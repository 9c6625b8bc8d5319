"""The texts of the searches of IQ2_XXS with error feedback.

A thread has a row with one of the levels that are tried for it, and tells the others what that costs.
Only the one with the least cost goes on.
"""

HEADER = """
// Of the costs of a row's levels the least, or the first of them.
inline uint least_of(const threadgroup float* costs, uint many) {
  uint best = 0;
  for (uint i = 1; i < many; i++) if (costs[i] < costs[best]) best = i;
  return best;
}
"""

_BEGIN = """
    threadgroup float4 table[512];
    threadgroup float sizes[1024];
    threadgroup float weights[32];
    threadgroup float costs[THREADS];
    uint own = thread_index_in_threadgroup, mine = own / LEVELS, choice = own % LEVELS;
    uint row = threadgroup_position_in_grid.x * EACH + mine;
    bool has = mine < EACH && row < uint(d_shape[0]);
"""

_STAGED = """
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage(levels, weights, 4, table, sizes, own, THREADS);
    threadgroup_barrier(mem_flags::mem_threadgroup);
"""

SEARCHED = (
    _BEGIN
    + """
    threadgroup float blocks[4 * 64];
    threadgroup float behind[32 * 32];
    for (uint i = own; i < 4 * 64; i += THREADS)
        blocks[i] = root[(i / 64 * 8 + i / 8 % 8) * 32 + i / 64 * 8 + i % 8];
    for (uint i = own; i < 32 * 32; i += THREADS) behind[i] = inverse[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (own < 32) {
        float sum = 0;
        for (uint c = 0; c < 8; c++) sum = fma(blocks[8 * own + c], blocks[8 * own + c], sum);
        weights[own] = sum;
    }
"""
    + _STAGED
    + """
    float rest[32], stored[32], error[32], cost = INFINITY, level = 0;
    uint codes[4];
    if (has) {
        float energy = 0, all = 0;
        #pragma unroll
        for (uint j = 0; j < 4; j++) load8(x + 32 * row + 8 * j, rest + 8 * j);
        #pragma unroll
        for (uint i = 0; i < 32; i++) {
            energy = fma(rest[i] * rest[i], weights[i], energy);
            all += weights[i];
        }
        float step = d[row], size = step * as_type<float>(TYPICAL);
        float share = size == 0 ? 0.0f : sqrt(energy / all) / size;
        level = min(max(rint(0.5f * (share - 1)), 0.0f), float(TOP));
        level = min(max(level + float(choice) - float(LEVELS / 2), 0.0f), float(TOP));
        cost = 0;
        #pragma unroll
        for (uint j = 0; j < 4; j++) {
            codes[j] = nearest(table, sizes + j, 4, weights + 8 * j, step * (2 * level + 1),
                               rest + 8 * j, stored + 8 * j);
            #pragma unroll
            for (uint c = 0; c < 8; c++) {
                float sum = 0;
                #pragma unroll
                for (uint i = 0; i < 8; i++)
                    sum = fma(rest[8 * j + i] - stored[8 * j + i], blocks[64 * j + 8 * i + c], sum);
                error[8 * j + c] = sum;
                cost = fma(sum, sum, cost);
            }
            #pragma unroll
            for (uint k = 8 * j + 8; k < 32; k++) {
                float sum = rest[k];
                #pragma unroll
                for (uint c = 0; c < 8; c++)
                    sum = fma(-error[8 * j + c], behind[(8 * j + c) * 32 + k], sum);
                rest[k] = sum;
            }
        }
    }
    costs[own] = cost;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (!has || least_of(costs + LEVELS * mine, LEVELS) != choice) return;
    found[row] = level;
    #pragma unroll
    for (uint j = 0; j < 4; j++) {
        points[4 * row + j] = codes[j];
        store8(values + 32 * row + 8 * j, stored + 8 * j);
        store8(errors + 32 * row + 8 * j, error + 8 * j);
    }
"""
)

CHANGED = (
    _BEGIN
    + """
    threadgroup float moment[32 * 32];
    threadgroup float solved[32 * 32];
    threadgroup float parts[4 * 64];
    for (uint i = own; i < 32 * 32; i += THREADS) {
        moment[i] = h[i];
        solved[i] = inverse[i];
    }
    for (uint i = own; i < 4 * 64; i += THREADS) parts[i] = eighths[i];
    for (uint i = own; i < 32; i += THREADS) weights[i] = h[33 * i];
"""
    + _STAGED
    + """
    float was[32], slope[32], stored[32], cost = INFINITY, near = 0, step = 0;
    uint codes[4];
    if (has) {
        step = d[row];
        near = min(max(level[row] + float(choice) - float(LEVELS / 2), 0.0f), float(TOP));
        #pragma unroll
        for (uint j = 0; j < 4; j++) {
            load8(values + 32 * row + 8 * j, was + 8 * j);
            load8(g + 32 * row + 8 * j, slope + 8 * j);
        }
        #pragma unroll
        for (uint j = 0; j < 4; j++) {
            float goal[8];
            #pragma unroll
            for (uint c = 0; c < 8; c++) goal[c] = was[8 * j + c];
            #pragma unroll
            for (uint i = 0; i < 32; i++) {
                #pragma unroll
                for (uint c = 0; c < 8; c++)
                    goal[c] = fma(slope[i], solved[32 * i + 8 * j + c], goal[c]);
            }
            codes[j] = nearest(table, sizes + j, 4, weights + 8 * j, step * (2 * near + 1), goal,
                               stored + 8 * j);
        }
        cost = 0;
        #pragma unroll
        for (uint c = 0; c < 32; c++) {
            float sum = 0;
            #pragma unroll
            for (uint i = 0; i < 32; i++) sum = fma(stored[i] - was[i], moment[32 * i + c], sum);
            cost = fma(stored[c] - was[c], 0.5f * sum - slope[c], cost);
        }
    }
    costs[own] = cost;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (!has || least_of(costs + LEVELS * mine, LEVELS) != choice) return;
    if (cost < 0) {
        #pragma unroll
        for (uint i = 0; i < 32; i++) {
            float moved = stored[i] - was[i];
            #pragma unroll
            for (uint c = 0; c < 32; c++) slope[c] = fma(-moved, moment[32 * i + c], slope[c]);
        }
        #pragma unroll
        for (uint i = 0; i < 32; i++) was[i] = stored[i];
    } else {
        near = level[row];
        #pragma unroll
        for (uint j = 0; j < 4; j++) codes[j] = points[4 * row + j];
    }
    new_level[row] = near;
    #pragma unroll
    for (uint j = 0; j < 4; j++) {
        float goal[8], next[8], moved[8], gain = 0;
        #pragma unroll
        for (uint c = 0; c < 8; c++) {
            goal[c] = was[8 * j + c];
            #pragma unroll
            for (uint i = 0; i < 8; i++)
                goal[c] = fma(slope[8 * j + i], parts[64 * j + 8 * i + c], goal[c]);
        }
        uint code = nearest(table, sizes + j, 4, weights + 8 * j, step * (2 * near + 1), goal, next);
        #pragma unroll
        for (uint i = 0; i < 8; i++) moved[i] = next[i] - was[8 * j + i];
        #pragma unroll
        for (uint c = 0; c < 8; c++) {
            float sum = 0;
            #pragma unroll
            for (uint i = 0; i < 8; i++)
                sum = fma(moved[i], moment[(8 * j + i) * 32 + 8 * j + c], sum);
            gain = fma(moved[c], 0.5f * sum - slope[8 * j + c], gain);
        }
        bool better = gain < 0;
        new_points[4 * row + j] = better ? code : codes[j];
        #pragma unroll
        for (uint i = 0; i < 8; i++) {
            moved[i] = better ? moved[i] : 0.0f;
            next[i] = better ? next[i] : was[8 * j + i];
        }
        store8(new_values + 32 * row + 8 * j, next);
        #pragma unroll
        for (uint i = 0; i < 8; i++) {
            #pragma unroll
            for (uint c = 8 * j + 8; c < 32; c++)
                slope[c] = fma(-moved[i], moment[(8 * j + i) * 32 + c], slope[c]);
        }
    }
"""
)
