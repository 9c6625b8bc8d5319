"""Reads an array and does nothing else: the bandwidth that other kernels are held against."""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels.dialect import Kernel

THREADS, GROUPS = 256, 4096

BODY = """
    uint at = threadgroup_position_in_grid.x * 256 + thread_index_in_threadgroup;
    uint a = 0, b = 0;
    const device uint4* p = (const device uint4*)words;
    for (uint i = at; i + 3 * STRIDE < COUNT; i += 4 * STRIDE) {
        uint4 v0 = p[i], v1 = p[i + STRIDE], v2 = p[i + 2 * STRIDE], v3 = p[i + 3 * STRIDE];
        a ^= v0.x ^ v1.y ^ v2.z ^ v3.w;
        b ^= v0.z ^ v1.w ^ v2.x ^ v3.y ^ v0.y ^ v1.x ^ v2.w ^ v3.z ^ v0.w ^ v1.z ^ v2.y ^ v3.x;
    }
    out[at] = a ^ b;
"""


@lru_cache
def kernel() -> Kernel:
    """The kernel."""
    return Kernel("read_speed", ["words"], ["out"], BODY)


def read_all(words: mx.array) -> mx.array:
    """uint32 (n,), a multiple of 16 THREADS GROUPS -> the exclusive or of what each thread read."""
    stride = THREADS * GROUPS
    return kernel()(
        [words],
        [((stride,), mx.uint32)],
        groups=(GROUPS, 1, 1),
        threads=THREADS,
        template=[("COUNT", words.size // 4), ("STRIDE", stride)],
    )[0]


def reference(words: mx.array) -> mx.array:
    """The exclusive or of all words, as NumPy would give it, for the whole array at once."""
    while words.size > 1:
        half = words.size // 2
        rest = words[2 * half :]
        words = mx.concatenate([words[:half] ^ words[half : 2 * half], rest])
    return words
