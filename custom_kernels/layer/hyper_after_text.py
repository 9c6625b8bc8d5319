"""The text that merges what a launch has computed of a sublayer into the streams, at the launch's end.

A threadgroup has the sublayer's values for 32 channels of one token: it makes those channels of all
streams, and multiplies them by their part of the matrix `fn` that comes next, as `hyper_out` does.
"""

from typing import Any

from ds4mlx.custom_kernels.layer.after import FIND
from ds4mlx.custom_kernels.layer.carried import MAKE, TAKE_STREAMS

# What is asked for before the values are there. A thread of the first four SIMD-groups has a channel of one
# stream, which is its SIMD-group's number; every SIMD-group multiplies some rows of fn, a lane a channel of
# all streams.
BEGIN = TAKE_STREAMS + MAKE + FIND
BEGIN += """
    threadgroup float values[4 * 32];
    uint group = simdgroup_index_in_threadgroup;
    uint slice = threadgroup_position_in_grid.x;
    uint channel = slice * 32 + lane, own = min(channel, uint(WIDTH - 1));
    float next[4 * EACH], old[4], kept[4], spread = 0;
    #pragma unroll
    for (uint i = 0; i < EACH; i++) {
        uint row = min(group + i * GROUPS, uint(FN_ROWS - 1));
        #pragma unroll
        for (uint j = 0; j < 4; j++) next[4 * i + j] = fn[(row * 4 + j) * WIDTH + own];
    }
    if (group < 4) {
        spread = post[group];
        #pragma unroll
        for (uint j = 0; j < 4; j++) {
            old[j] = float(streams[j * WIDTH + own]);
            kept[j] = comb[4 * j + group];
        }
    }
"""

_MERGE = """
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group < 4) {
        float v = spread * float(static_cast<T>(%s));
        #pragma unroll
        for (uint j = 0; j < 4; j++) v = fma(kept[j], old[j], v);
        v = channel < WIDTH ? float(static_cast<T>(v)) : 0.0f;
        if (channel < WIDTH) merged[group * WIDTH + channel] = static_cast<T>(v);
        values[32 * group + lane] = v;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float v[4], square = 0;
    #pragma unroll
    for (uint j = 0; j < 4; j++) {
        v[j] = values[32 * j + lane];
        square = fma(v[j], v[j], square);
    }
    if (group == 0) {
        square = simd_sum(square);
        if (lane == 0) partial[slice * (FN_ROWS + 1) + FN_ROWS] = square;
    }
    #pragma unroll
    for (uint i = 0; i < EACH; i++) {
        uint row = group + i * GROUPS;
        float sum = 0;
        #pragma unroll
        for (uint j = 0; j < 4; j++) sum = fma(next[4 * i + j], v[j], sum);
        sum = simd_sum(sum);
        if (lane == 0 && row < FN_ROWS) partial[slice * (FN_ROWS + 1) + row] = sum;
    }
"""


def merge(value: str) -> str:
    """The end of a body; `value`: what the sublayer gives for the lane's channel, once all have come here."""
    return _MERGE % value


def template(rows: int, groups: int, begin: int) -> list[tuple[str, Any]]:
    """What the text is told of a matrix of so many rows, in threadgroups of so many SIMD-groups.

    begin: where in the array `after` the weights for what the sublayer gives begin.
    """
    return [("FN_ROWS", rows), ("EACH", -(-rows // groups)), ("AFTER_AT", begin)]
