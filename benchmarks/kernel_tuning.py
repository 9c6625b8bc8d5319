"""Rows a SIMD-group takes and SIMD-groups of a threadgroup, for the experts' kernels: which is fastest here.

    python benchmarks/kernel_tuning.py [--rows 1,2,4] [--groups 4,8,16] [--results FILE]

The constants ROWS and GROUPS at the top of each kernel's file are what this is to set.
"""

import argparse
import json
import sys
from pathlib import Path

from device import device

from ds4mlx.bench.kernels import Experts, measure, read_bandwidth
from ds4mlx.custom_kernels import dialect
from ds4mlx.custom_kernels.products import experts_down, experts_up


def main() -> None:
    """Print GB/s of every combination, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,2,4")
    parser.add_argument("--groups", default="4,8,16")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if dialect.target() is None:
        sys.exit("kernels run on a GPU, and MLX has none here")
    combinations = [
        (int(rows), int(groups))
        for rows in arguments.rows.split(",")
        for groups in arguments.groups.split(",")
    ]
    read = read_bandwidth()
    print(f"{device()}: reads {read / 1e9:.0f} GB/s")
    found = [
        row for kind in ("iq2_xxs", "q4_k", "mxfp4") for row in experts(kind, combinations, read)
    ]
    if arguments.results:
        result = {"device": device(), "read_gb_per_s": read / 1e9, "rows": found}
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")


def experts(kind: str, combinations: list[tuple[int, int]], read: float) -> list[dict]:
    """Both launches of one token's experts."""
    format = (kind, "q2_k" if kind == "iq2_xxs" else kind)
    layer = Experts(format, 1)
    k = layer.config.num_experts_per_tok
    up, down = 2 * k * layer.pieces("w1"), k * layer.pieces("w2")
    rows = each(f"experts_up {kind}", experts_up, layer.up, layer.x, up, combinations, read)
    name = f"experts_down {format[1]}"
    return rows + each(name, experts_down, layer.down, layer.hidden, down, combinations, read)


def each(name, module, call, x, nbytes: float, combinations, read: float) -> list[dict]:
    """GB/s of a call at every combination; the module's constants stay as they were."""
    kept, found = (module.ROWS, module.GROUPS), []
    for rows, groups in combinations:
        module.ROWS, module.GROUPS = rows, groups
        try:
            seconds = measure(call, x)
        except RuntimeError as error:  # more registers than there are, say
            print(f"{name:<24} rows {rows} groups {groups:>2}: {error}")
            continue
        rate = nbytes / seconds
        print(
            f"{name:<24} rows {rows} groups {groups:>2} {seconds * 1e6:7.1f} us "
            f"{rate / 1e9:7.0f} GB/s {rate / read:6.1%}{'  *' if (rows, groups) == kept else ''}",
            flush=True,
        )
        found.append({"kernel": name, "rows": rows, "groups": groups, "us": seconds * 1e6})
    module.ROWS, module.GROUPS = kept
    return found


if __name__ == "__main__":
    main()
