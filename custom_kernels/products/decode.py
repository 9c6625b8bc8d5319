"""A stored matrix as plain values: one launch, at about the speed of memory.

A thread decodes 32 columns of a row. They go through threadgroup memory, so that neighbouring threads
write neighbouring words.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.codes.tables import lut
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.products import tiles
from ds4mlx.formats import FORMATS, Planes

THREADS = 128

# Groups of 32 columns are numbered through all rows. WORDS: 16-byte words of a group's values.
BODY = """
    threadgroup uint4 words[THREADS * (WORDS + 1)];
    threadgroup uint4 lut[LUT];
    uint at = thread_index_in_threadgroup, first = threadgroup_position_in_grid.x * THREADS;
    uint columns = uint(w_weight_shape[1]) * PER, each = columns / 32;
    uint groups = uint(w_weight_shape[0]) * each;
    if (LUT > 1) {
        for (uint i = at; i < LUT; i += THREADS) lut[i] = ((const device uint4*)table)[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (first + at < groups) {
        float v[32];
        values(load_group(W, (first + at) / each, (first + at) % each, columns), v, lut);
        threadgroup T* own = (threadgroup T*)(words + at * (WORDS + 1));
        #pragma unroll
        for (uint i = 0; i < 4; i++) put8(own + 8 * i, v + 8 * i);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    #pragma unroll
    for (uint i = 0; i < WORDS; i++) {
        uint word = i * THREADS + at;
        if (first + word / WORDS < groups)
            ((device uint4*)out)[size_t(first) * WORDS + word] = words[word + word / WORDS];
    }
"""


@lru_cache
def kernel(format: str, dtype: mx.Dtype) -> Kernel:
    """The kernel of a format, for values of a type."""
    packing, found = PACKINGS[format], FORMATS[format]
    planes, per = packing.names("w"), 256 // found.widths(256)["weight"]
    defined = f"#define W {', '.join(planes)}\n#define PER {per}\n#define WORDS {2 * dtype.size}\n"
    name = f"decode_{format}_{'f32' if dtype == mx.float32 else 'bf16'}"
    text = defined + (tiles.FLOAT if dtype == mx.float32 else tiles.BF16) + packing.decoding
    return Kernel(name, ["table", *planes], ["out"], BODY, text)


def decode(format: str, planes: Planes, dtype: mx.Dtype) -> mx.array:
    """The values (..., out, in) of planes in a format of PACKINGS, rounded to float32 or bfloat16."""
    *stack, width = planes["weight"].shape
    columns = width * 256 // FORMATS[format].widths(256)["weight"]
    rows = {plane: array.reshape(-1, array.shape[-1]) for plane, array in planes.items()}
    count = rows["weight"].shape[0]
    return kernel(format, dtype)(
        [lut(format), *(rows[plane] for plane in PACKINGS[format].planes)],
        [((*stack, columns), dtype)],
        groups=(-(-count * columns // (32 * THREADS)), 1, 1),
        threads=THREADS,
        template=[("T", dtype), ("THREADS", THREADS)],
    )[0]


def reference(format: str, planes: Planes, dtype: mx.Dtype) -> mx.array:
    """The same by MLX's own operations."""
    return FORMATS[format].decode(planes).astype(dtype)
