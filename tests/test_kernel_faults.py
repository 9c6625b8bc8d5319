"""Faults seeded into kernels, one at a time: the comparison with the references catches each.

Also what Apple's compiler would refuse, in every kernel as it is.
"""

from functools import partial

import mlx.core as mx
import pytest
from metalsim import check
from spoiling import assert_caught, assert_two_each, executor_only, fault_ids, handed_to_metal

from ds4mlx.custom_kernels.cases import index, routed
from ds4mlx.custom_kernels.cases import modules as cases
from ds4mlx.custom_kernels.cases.modules import (
    LESS_DOWN,
    LESS_UP,
    MANY_DOWN,
    MANY_UP,
    ODD_DOWN,
    ODD_UP,
)

pytestmark = executor_only

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
F32, BF16 = mx.float32, mx.bfloat16


def up(format, dtype=F32):
    return partial(cases.up, format, dtype, ODD_UP)


def down(format, dtype=F32):
    return partial(cases.down, format, dtype, ODD_DOWN)


def up8(format):
    return partial(cases.up, format, BF16, ODD_UP, eight=True)


def down8(format):
    return partial(cases.down, format, F32, ODD_DOWN, eight=True)


def up_sorted(format):
    return partial(cases.up_sorted, format, F32, MANY_UP)


def down_sorted(format):
    return partial(cases.down_sorted, format, F32, MANY_DOWN)


def many_up(format):
    return partial(cases.up_sorted, format, BF16, MANY_UP)


def less_up(format):
    return partial(cases.up_sorted, format, BF16, LESS_UP)


def many_down(format):
    return partial(cases.down_sorted, format, BF16, MANY_DOWN)


def less_down(format):
    return partial(cases.down_sorted, format, BF16, LESS_DOWN)


tiles = partial(cases.runs, [3, 0, 64, 65, 0], 64)
router = partial(cases.route, F32, 37, 264, 2, False)
hashed = partial(cases.route, F32, 16, 264, 3, True)
post = partial(cases.post, F32, 288, 2)

# kernel, what is computed, the text, what stands in its place
FAULTS = [
    ("experts_up_iq2_xxs", up("iq2_xxs"), "(t << 3) ^ (b << 6)", "(t << 3)"),
    ("experts_up_iq2_xxs", up("iq2_xxs"), "t >> 1, b >> 2", "t >> 1, b >> 1"),
    ("experts_up_iq2_xxs", up("iq2_xxs"), ">> 28)) * 0.25f", ">> 27)) * 0.25f"),
    ("experts_up_iq2_xxs", up("iq2_xxs", BF16), "- 7 * p - i", "- 7 * p"),
    ("experts_up_iq2_xxs", up("iq2_xxs"), f"FREE);\n    }}\n    {BARRIER}", "FREE);\n    }"),
    ("experts_up_q2_k", up("q2_k"), "float(byte >> 4)", "float(byte & 15u)"),
    ("experts_up_q2_k", up("q2_k", BF16), "w >>= 10", "w >>= 8"),
    ("experts_up_q2_k_bytes", up8("q2_k"), "sum * scale;", "sum;"),
    ("experts_up_q2_k_bytes", up8("q2_k"), "& 255u) << (8 * j)", ") << (8 * j)"),
    ("experts_up_sorted_q2_k", up_sorted("q2_k"), "weights[order[row0 + r]]", "weights[row0 + r]"),
    ("experts_up_sorted_q2_k", up_sorted("q2_k"), "rows - 1)", "rows - 2)"),
    ("experts_up_fragments_q2_k", less_up("q2_k"), "j % 2 ? w >> 16 : w", "w"),
    ("experts_up_fragments_q2_k", many_up("q2_k"), "column < HIDDEN)", "true)"),
    ("experts_up_q4_k", up("q4_k"), "((s & 0xc0c0u) >> 2)", "((s & 0xc0c0u) >> 4)"),
    ("experts_up_q4_k", up("q4_k", BF16), "fill2(-64.0f)", "fill2(-60.0f)"),
    ("experts_up_q4_k", up("q4_k"), "job / TOPK", "job % TOPK"),
    ("experts_up_mxfp4", up("mxfp4"), "0x0e000e00u", "0x06000600u"),
    ("experts_up_mxfp4", up("mxfp4"), "(p.scales >> (8 * h))", "(p.scales >> (8 - 8 * h))"),
    ("experts_up_mxfp4", up("mxfp4"), "up < -limit ? -limit : up", "up"),
    ("experts_down_q2_k", down("q2_k"), "float(byte >> 4)", "float(byte & 15u)"),
    ("experts_down_q2_k", down("q2_k", BF16), "s ? sum1 : sum0", "s ? sum0 : sum1"),
    ("experts_down_q2_k", down("q2_k"), "w >>= 10", "w >>= 8"),
    ("experts_down_q2_k", down("q2_k"), "slot = next / per;", "slot = 0;"),
    ("experts_down_q4_k", down("q4_k"), "(c & 2u) != 0", "(c & 1u) != 0"),
    ("experts_down_q4_k", down("q4_k"), "(p.mins >> (8 * h))", "(p.mins >> (8 - 8 * h))"),
    ("experts_down_mxfp4", down("mxfp4"), "(w >> 3)", "(w >> 2)"),
    ("experts_down_mxfp4", down("mxfp4"), "row0 + r < WIDTH) PUT_ROUTED", "true) PUT_ROUTED"),
    (
        "experts_up_iq2_xxs_bytes",
        up8("iq2_xxs"),
        "(m * 255u)) + m, x[2 * k]",
        "(m * 255u)), x[2 * k]",
    ),
    ("experts_up_iq2_xxs_bytes", up8("iq2_xxs"), "8 * k + 4", "8 * k + 3"),
    ("experts_up_q4_k_bytes", up8("q4_k"), "#define APART 2", "#define APART 1"),
    ("experts_up_q4_k_bytes", up8("q4_k"), "sum * scale;", "sum;"),
    ("experts_down_q2_k_bytes", down8("q2_k"), "x[4 * s + i]", "x[4 * s + 3 - i]"),
    ("experts_down_q2_k_bytes", down8("q2_k"), "& 255u) << (8 * j)", ") << (8 * j)"),
    ("experts_down_q4_k_bytes", down8("q4_k"), "most / 127.0f", "most / 128.0f"),
    ("experts_down_q4_k_bytes", down8("q4_k"), "(4 * (i % 2))", "(4 - 4 * (i % 2))"),
    (
        "experts_up_sorted_iq2_xxs",
        up_sorted("iq2_xxs"),
        "weights[order[row0 + r]]",
        "weights[row0 + r]",
    ),
    (
        "experts_up_sorted_iq2_xxs",
        up_sorted("iq2_xxs"),
        "sign_pairs(group.w.y, ",
        "sign_pairs(group.w.x, ",
    ),
    ("experts_up_sorted_q4_k", up_sorted("q4_k"), ">= SPAN / 2)", ">= SPAN / 4)"),
    ("experts_up_sorted_q4_k", up_sorted("q4_k"), f"k++) {{\n        {BARRIER}", "k++) {"),
    ("experts_up_sorted_mxfp4", up_sorted("mxfp4"), "v[i + 4] *= scale;", ""),
    ("experts_up_sorted_mxfp4", up_sorted("mxfp4"), "c[i][j + across / 2].v", "c[i][j].v"),
    (
        "experts_down_sorted_q2_k",
        down_sorted("q2_k"),
        "place = order[row0 + r]",
        "place = row0 + r",
    ),
    ("experts_down_sorted_q2_k", down_sorted("q2_k"), "min(k + 1, ", "min(k, "),
    (
        "experts_down_sorted_q4_k",
        down_sorted("q4_k"),
        "group.least, v + i, 4)",
        "group.least, v + i, 3)",
    ),
    ("experts_down_sorted_q4_k", down_sorted("q4_k"), "rows - 1)", "rows - 2)"),
    ("experts_down_sorted_mxfp4", down_sorted("mxfp4"), "/ TALL) * 16", "/ TALL) * 8"),
    ("experts_down_sorted_mxfp4", down_sorted("mxfp4"), "j == 2 ? group.w.z", "j == 3 ? group.w.z"),
    ("experts_sum", down_sorted("q2_k"), "k < TOPK", "k < TOPK - 1"),
    ("experts_sum", down_sorted("q2_k"), "token * TOPK + k", "token + k"),
    ("experts_down_sorted_q4_k", down_sorted("q4_k"), f"{BARRIER}\n        group = ", "group = "),
    (
        "experts_down_sorted_q4_k",
        down_sorted("q4_k"),
        "r = down + TALL / 2 * i",
        "r = down + 16 * i",
    ),
    (
        "experts_down_sorted_q4_k",
        down_sorted("q4_k"),
        "right + 16 * j) * LD",
        "right + 8 * j) * LD",
    ),
    (
        "experts_up_fragments_iq2_xxs",
        many_up("iq2_xxs"),
        "weights[order[row0 + r]]",
        "weights[row0 + r]",
    ),
    (
        "experts_up_fragments_iq2_xxs",
        less_up("iq2_xxs"),
        f"copied<STAGES - 2>();\n            {BARRIER}",
        "",
    ),
    ("experts_up_fragments_iq2_xxs", less_up("iq2_xxs"), "w.y, j / 2)", "w.y, j % 2)"),
    ("experts_up_fragments_q4_k", many_up("q4_k"), "column < HIDDEN)", "true)"),
    ("experts_up_fragments_q4_k", less_up("q4_k"), "rows - 1)) * C", "rows - 2)) * C"),
    ("experts_up_fragments_q4_k", less_up("q4_k"), "min(chunk + 1, ", "min(chunk, "),
    ("experts_up_fragments_mxfp4", many_up("mxfp4"), "2 * s + j, v", "2 * j + s, v"),
    ("experts_up_fragments_mxfp4", less_up("mxfp4"), "sum(c[1][t], 1, e)", "sum(c[1][t], 0, e)"),
    ("experts_up_fragments_mxfp4", less_up("mxfp4"), "lane / 16 * 4 + ", "lane / 16 + "),
    (
        "experts_down_fragments_q2_k",
        less_down("q2_k"),
        "place = order[row0 + r]",
        "place = row0 + r",
    ),
    ("experts_down_fragments_q2_k", many_down("q2_k"), "if (r >= rows) continue;", ""),
    ("experts_down_fragments_q2_k", many_down("q2_k"), "j % 2 ? w >> 16 : w", "w"),
    ("experts_down_fragments_q4_k", many_down("q4_k"), "from + 128, lane", "from, lane"),
    ("experts_down_fragments_q4_k", less_down("q4_k"), "if (column < WIDTH)", ""),
    ("experts_down_fragments_mxfp4", many_down("mxfp4"), "piece % 2 * 8;", "piece % 2 * 16;"),
    ("experts_down_fragments_mxfp4", less_down("mxfp4"), "k + STAGES - 1 < ", "k + STAGES < "),
    ("experts_down_fragments_mxfp4", less_down("mxfp4"), "p < 2 * u + 2", "p < 2 * u + 1"),
    ("expert_tiles", tiles, "< at + s)", "<= at + s)"),
    ("expert_tiles", tiles, f"{BARRIER}\n        ends[at] = sum;", "ends[at] = sum;"),
    ("expert_tiles", tiles, "+ TALL - 1) / TALL : 0", ") / TALL : 0"),
    ("router", router, "scores[e] + bias[e]", "scores[e]"),
    ("router", router, "float s = scores[which];", "float s = best;"),
    ("router", router, f"    {BARRIER}", ""),
    ("router_hashed", hashed, "ids[token]", "ids[0]"),
    ("router_hashed", hashed, "lane < SCORED ? mine : 0.0f", "mine"),
    ("hyper_post", post, "16 + 4 * j + k", "16 + 4 * k + j"),
    ("hyper_post", post, "post[token * 4 + k]", "post[k]"),
]


@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)
    assert len(FAULTS) >= 20


COMPUTED = [
    up("iq2_xxs", BF16),
    up("q4_k", BF16),
    up("mxfp4", BF16),
    up("mxfp4"),
    down("q2_k", BF16),
]
COMPUTED += [up8("iq2_xxs"), down8("q2_k"), down8("q4_k")]
COMPUTED += [many_up("iq2_xxs"), less_up("iq2_xxs"), many_down("q2_k"), down_sorted("q4_k")]
COMPUTED += [many_up("mxfp4"), many_up("q4_k"), many_down("q4_k"), up_sorted("iq2_xxs")]
COMPUTED += [router, hashed, partial(cases.post, BF16, 288, 2)]
COMPUTED += [
    partial(index.scores, BF16, kind, index.TALKER, (96, 8), 284, 67) for kind in ("index", "plain")
]
COMPUTED.append(partial(index.select, mx.zeros((3000,)), 2999, 512, each=1))

COMPUTED += [
    partial(routed.up, "iq2_xxs", BF16, 256, 3, 4096, 1, 6),
    partial(routed.up, "mxfp4", F32, 37, 21, 256, 2, 6, True),
    partial(routed.down, "q2_k", BF16, "mxfp8", (8, 2048, 2048, 21), 1, 6),
    partial(routed.down, "mxfp4", F32, "q8_0", (5, 256, 320, 37), 8, 2),
]


def test_texts_keep_apples_rules():
    with handed_to_metal() as handed:
        for compute in COMPUTED:
            compute()
    launches = dict(handed)
    assert len(launches) >= len(COMPUTED)
    assert check(*launches.values()) == []
