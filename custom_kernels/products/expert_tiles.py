"""Which rows of the sorted tokens each threadgroup of a grouped product takes: one launch.

Pairs (token, expert) are sorted by expert; every expert's run of rows is cut into tiles. How many
tiles there are is known on the device only, so the grid holds the most there can be, and the tiles
that are not needed have no rows.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels.dialect import Kernel

THREADS = 1024  # also the most experts there may be

BODY = """
    threadgroup uint ends[1024];
    uint at = thread_index_in_threadgroup, count = uint(experts_shape[0]);
    uint most = min(count, (count + TALL - 1) / TALL + EXPERTS);
    // The run of expert `at`: from the first row of an expert >= at to the first of one > at.
    uint bounds[2];
    for (uint s = 0; s < 2; s++) {
        uint low = 0, high = count;
        while (low < high) {
            uint middle = (low + high) / 2;
            if (uint(experts[middle]) < at + s) low = middle + 1;
            else high = middle;
        }
        bounds[s] = low;
    }
    uint tiles_here = at < EXPERTS ? (bounds[1] - bounds[0] + TALL - 1) / TALL : 0;
    ends[at] = tiles_here;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint step = 1; step < 1024; step *= 2) {
        uint sum = ends[at] + (at >= step ? ends[at - step] : 0);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        ends[at] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    uint first = ends[at] - tiles_here;
    for (uint i = 0; i < tiles_here; i++) {
        uint row = bounds[0] + i * TALL;
        tiles[4 * (first + i)] = int(at);
        tiles[4 * (first + i) + 1] = int(row);
        tiles[4 * (first + i) + 2] = int(min(bounds[1] - row, uint(TALL)));
        tiles[4 * (first + i) + 3] = 0;
    }
    for (uint i = 4 * ends[1023] + at; i < 4 * most; i += 1024) tiles[i] = 0;
"""


@lru_cache
def kernel() -> Kernel:
    """The kernel."""
    return Kernel("expert_tiles", ["experts"], ["tiles"], BODY)


def most_tiles(count: int, experts: int, tall: int) -> int:
    """Tiles of at most `tall` rows that `count` sorted rows of so many experts can have."""
    return min(count, -(-count // tall) + experts)


def expert_tiles(chosen: mx.array, experts: int, tall: int) -> mx.array:
    """chosen int (P,), ascending, below `experts` <= 1024 -> int32 (most_tiles, 4).

    A row is expert, first row, rows (at most `tall`, 0 in tiles not needed), 0.
    """
    most = most_tiles(chosen.size, experts, tall)
    return kernel()(
        [chosen],
        [((most, 4), mx.int32)],
        groups=(1, 1, 1),
        threads=THREADS,
        template=[("EXPERTS", experts), ("TALL", tall)],
    )[0]
