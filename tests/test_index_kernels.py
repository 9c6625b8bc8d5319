"""The index kernels: scores and choice equal their references, and the plain bodies the modules."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from spoiling import assert_caught, assert_two_each, executor_only, fault_ids, on_metal

from ds4mlx import ModelConfig
from ds4mlx.custom_kernels.cases import index as cases
from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.layer import index_scores, index_select
from ds4mlx.custom_kernels.layer.row_layout import RowLayout
from ds4mlx.custom_kernels.products.columns import whole
from ds4mlx.model.indexer import Indexer
from ds4mlx.state.rounding import spread_index
from ds4mlx.state.row_forms import StateForm


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["official", "none"])
def test_scores_without_kernels_are_the_modules(dtype, rounding):
    config = ModelConfig(index_n_heads=2, index_head_dim=64, hidden_size=64, q_lora_rank=32)
    heads, width, rope = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
    indexer = Indexer(config, rounding)
    form = StateForm.of(config, dtype, rounding).index
    q = normal((heads, width), dtype, 1)
    weights, angles = normal((1, heads), mx.float32, 2), cases.angles_of(rope, 150)
    indexer.wq_b = lambda _: q.reshape(1, -1)
    packed = form.pack(spread_index(normal((37, width), dtype, 3), rounding))
    scale = (width * heads) ** -0.5
    queries = indexer.queries(q, (angles[1, :1], angles[1, 1:]))
    want = indexer.scores(queries, weights * scale, packed, form, 1 << 20)[0]
    # 21 rows are settled; what else lies in `full` is rubbish, and so is the tail's last row
    full = mx.concatenate([packed[:21], packed[:11]])
    rows = cases.grown(full, mx.concatenate([packed[21:], packed[:1]]))
    got = index_scores.index_scores(
        *(whole(q.astype(mx.float32).reshape(1, -1)), whole(weights), [rows]),
        *(cases.place_of(150, 21)[None], angles[None]),
        heads=heads,
        form=form,
        spread=rounding == "official",
        dtype=dtype,
    )
    np.testing.assert_allclose(np.array(got[0, :37]), np.array(want), rtol=1e-5, atol=1e-5)
    assert (np.array(got[0, 37:]) == -np.inf).all()


@pytest.mark.parametrize("visible, topk", [(0, 8), (5, 8), (8, 8), (9, 8), (37, 8), (40, 64)])
def test_choice_without_kernels_is_of_visible_rows(visible, topk):
    values = mx.array(np.random.default_rng(visible).permutation(40).astype(np.float32))
    place = cases.place_of(4 * visible + 2)[None]
    (chosen,) = index_select.index_select(values[None], place, topk=topk)
    best = np.argsort(-np.array(values[:visible]))[:topk]
    want = sorted(best.tolist()) + [-1] * (topk - len(best))
    assert sorted(chosen.tolist(), key=lambda j: (j < 0, j)) == want


@executor_only
@pytest.mark.parametrize("kind", ["index", "plain"])
@pytest.mark.parametrize("where", ["query", "weight", "row"])
def test_nan_reaches_the_scores_it_belongs_to(kind, where):
    layout = RowLayout("plain", 32, 32, mx.float32)
    if kind == "index":
        layout = RowLayout("index", 32, 5, mx.uint32)
    full, tail = cases.rows_of(layout, (16, 8))
    q, weights = normal((1, 64), mx.float32, 1), normal((1, 2), mx.float32, 2)
    if where == "query":
        q[0, 40] = mx.nan
    elif where == "weight":
        weights[0, 1] = mx.inf * 0
    else:
        full[3] = mx.array(0x7F7F7F7F, mx.uint32) if kind == "index" else mx.nan
    operands = whole(q), whole(weights), [cases.grown(full, tail)], cases.place_of(87, 16)[None]
    operands += (cases.angles_of(8, 87)[None],)
    with on_metal():
        (scores,) = index_scores.by_kernel(*operands, heads=2, layout=layout, dtype=mx.float32)
    spoilt = np.isnan(np.array(scores))
    assert spoilt[:22].all() if where != "row" else kind == "index" or spoilt.nonzero()[0] == [3]
    assert not spoilt[22:].any()


@executor_only
@pytest.mark.parametrize("each", [1, 16])
def test_nan_scores_come_last_and_rows_stay_in_bounds(each):
    values = normal((1500,), mx.float32, 1)
    values[100:1200] = mx.nan
    with on_metal():
        place = cases.place_of(4 * 1400 - 1)
        (chosen,) = index_select.by_kernel(values[None], place[None], 512, 4, each)
    rows = np.array(chosen)
    assert rows.min() >= 0 and rows.max() < 1400 and len(set(rows.tolist())) == 512
    assert len(set(rows.tolist()) & {*range(100), *range(1200, 1400)}) == 300


def scored(kind, sizes=cases.TALKER, dtype=mx.float32, others=0):
    return partial(cases.scores, dtype, kind, sizes, (96, 8), 4 * 71, 67, most=1, others=others)


def chosen(visible, kinds=1000, each=16):
    return partial(cases.select, cases.several(3000, 5, kinds), visible, 512, each)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("index_scores_coded", scored("index"), "(j) < settled ?", "(j) <= settled ?"),
    ("index_scores_coded", scored("index"), "((j) - settled)", "(j)"),
    ("index_scores_coded", scored("index"), "(masked >> 1)", "masked"),
    ("index_scores_coded", scored("index"), "(c >> 3) & (high | low", "(c >> 3) & (low"),
    ("index_scores_coded", scored("index"), "product[r] < 0 ? 0.0f : product[r]", "product[r]"),
    ("index_scores_coded", scored("index"), "(8 * (s % 4))", "(8 * (s % 2 ^ 1))"),
    (
        "index_scores_coded",
        scored("index", dtype=mx.bfloat16),
        "b * EACH == 8 ||",
        "b * EACH == 4 ||",
    ),
    ("index_scores_coded", scored("index"), "(c & 1 ? mate : -mate)", "mate"),
    ("index_scores_coded", scored("index"), f"{BARRIER}\n    uint many", "uint many"),
    ("index_scores_coded", scored("index"), "rint(", "floor("),
    ("index_scores_coded_2", scored("index", others=1), "places + 8 * sequence", "places"),
    ("index_scores_coded_2", scored("index", others=1), "sequence * rows", "0"),
    ("index_scores_coded_4", scored("index", others=2), "full = (const device ROW*)full2;", ""),
    (
        "index_scores_coded_4",
        scored("index", others=2),
        "turns + uint(place[4])",
        "turns + 1 + 0 *",
    ),
    ("index_select", chosen(3000), "OWN * 8 * token", "0"),
    ("index_scores_plain", scored("plain"), "(j) < settled ?", "(j) <= settled ?"),
    ("index_scores_plain", scored("plain"), "angles[ROPE + k]", "angles[k]"),
    ("index_scores_plain", scored("plain", cases.TINY), "if (other > h)", "if (true)"),
    ("index_scores_plain", scored("plain", (34, 32, 8)), "if (other > h)", "if (false)"),
    ("index_select", chosen(3000), "u >> 31 ? ~0u", "u >> 31 ? 0u"),
    ("index_select", chosen(3000, 600), "(second ? a : 0u)", "0u"),
    ("index_select", chosen(3000, 7), "+ TOPK - need", ""),
    ("index_select", chosen(3000), f"{BARRIER}\n  sum += simd_sum", "sum += simd_sum"),
    ("index_select_next", chosen(400, each=1), "b += TOPK", "b += 0"),
    ("index_select_next", chosen(2999, each=1), "chosen[token * many + from + (i)]", "chosen[(i)]"),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)
