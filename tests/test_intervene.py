"""Changing quantities of a running model: what changes, where, and what is left afterwards."""

import mlx.core as mx
import numpy as np
import pytest
from reference import run, run_chunks
from test_taps import graph

from ds4mlx import DataError, load
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.model.taps import listened
from ds4mlx.research import (
    ablate,
    ablate_experts,
    add,
    at,
    forbid_experts,
    force_experts,
    force_rows,
    hide_rows,
    patch,
    project_out,
    scale,
)
from ds4mlx.state.changes import changes as in_force

IDS = np.random.default_rng(5).integers(0, 288, 400)


@pytest.fixture(scope="module")
def small_model(small_dir):
    """The small model with plain weights, which a CPU multiplies by faster, and a test may set."""
    model = load(small_dir, dtype=mx.float32)[0]
    decode_weights(model)
    return model


def changed(model, changes, ids, chunks=(), **options):
    with model.intervene(changes, **options):
        return run_chunks(model, ids, chunks)


@pytest.mark.parametrize("chunks", [[], [30, 9, 1, 1]], ids=["whole", "chunks and steps"])
def test_its_own_activations_change_nothing_bit_for_bit(small_model, chunks):
    """All of them at once, and one kind at a time where a layer could undo what another did."""
    ids = IDS[:42]
    usual = run_chunks(small_model, ids, chunks)
    with small_model.trace("**") as t:
        assert (run_chunks(small_model, ids, chunks) == usual).all()
    fixed = {name for name, site in small_model.sites().items() if site.fixed}
    every = {name: patch(t) for name in t if name not in fixed}
    assert (changed(small_model, every, ids, chunks) == usual).all()
    kinds = {name.removeprefix("layers.1.") for name in every if name.startswith("layers.1.")}
    for kind in sorted(kinds) if not chunks else ("attn.rows", "attn.indexer.chosen", "ffn.router"):
        assert (changed(small_model, {f"layers.1.{kind}": patch(t)}, ids, chunks) == usual).all()


def test_in_bfloat16_too(small_dir):
    model = load(small_dir)[0]
    usual = run_chunks(model, IDS[:70], [50])
    with model.trace("layers.**") as t:
        run_chunks(model, IDS[:70], [50])
    every = {name: patch(t) for name in t if not model.sites()[name].fixed}
    assert (changed(model, every, IDS[:70], [50]) == usual).all()


def test_an_ablated_expert_is_one_of_weight_zero(small_model):
    """As the recorded weights say, and as if its w2 had been zero."""
    names = ["layers.1.ffn.router.weights", "layers.1.ffn.router.experts"]
    with small_model.intervene({names[0]: ablate_experts(2)}), small_model.trace(*names) as t:
        got = run(small_model, IDS[:40])
    of_two = np.array(t[names[1]]) == 2
    assert of_two.any() and ((np.array(t[names[0]]) == 0) == of_two).all()
    zero = lambda value, where: mx.where((where.experts == 2)[..., None], 0, value)
    each = {"layers.1.ffn.experts.each": zero}
    assert (changed(small_model, each, IDS[:40]) == got).all()
    stack = small_model.layers[1].ffn.experts.w2
    values = stack.weight
    stack.weight = mx.where(mx.arange(len(values))[:, None, None] == 2, 0, values)
    without = run(small_model, IDS[:40])
    stack.weight = values
    assert np.abs(without - got).max() <= 1e-5


@pytest.mark.parametrize("layer", [0, 1], ids=["by the table", "by score"])
def test_experts_are_forced_and_forbidden(small_model, layer):
    name = f"layers.{layer}.ffn.router"
    for change, among in ((forbid_experts(0, 1), False), (force_experts(3), True)):
        with small_model.intervene({f"{name}.choice": change}), small_model.trace(name) as t:
            run(small_model, IDS[:30])
        experts, weights = np.array(t[f"{name}.experts"]), np.array(t[f"{name}.weights"])
        assert (experts == 3).any(-1).all() if among else (experts > 1).all()
        assert (experts[..., 0] != experts[..., 1]).all()
        scale = small_model.args.routed_scaling_factor
        assert np.abs(weights.sum(-1) - scale).max() < 1e-5


@pytest.mark.parametrize("layer", [1, 2])
def test_hidden_rows_get_no_weight(small_model, layer):
    names = f"layers.{layer}.attn.visible", f"layers.{layer}.attn.window_visible"
    site = f"layers.{layer}.attn.weights"
    hidden = {names[0]: hide_rows(0), names[1]: hide_rows(100, 101)}
    with small_model.intervene(hidden), small_model.trace(site) as t:
        run(small_model, IDS[:135])
    for rows, shares, gone in (("rows", "compressed", [0]), ("positions", "window", [100, 101])):
        rows, shares = np.array(t[f"{site}.{rows}"]), np.array(t[f"{site}.{shares}"])
        of_gone = np.isin(rows, gone)[:, :, None] & (shares > 0)
        assert not of_gone.any() and ((shares > 0).any() or layer == 2)


def test_a_forced_row_is_chosen_where_it_is_visible(small_model):
    site = "layers.1.attn.indexer"
    with small_model.intervene({f"{site}.scores": force_rows(7)}), small_model.trace(site) as t:
        run(small_model, IDS[:90])
    chosen = np.array(t[f"{site}.chosen"])[0]
    assert ((chosen == 7).any(-1) == (np.arange(90) >= 31)).all()


CHANGES = {
    "embed": scale(2),
    "layers.0.hc_attn.pre": scale(0.5),
    "layers.1.hc_ffn.comb": lambda value, where: mx.swapaxes(value, -1, -2),
    "layers.1.attn.query_latent": scale(-1),
    "layers.1.attn.window_rows": add(0.3),
    "layers.1.attn.rows": ablate(),
    "layers.1.attn.indexer.rows": scale(-1),
    "layers.1.attn.indexer.scores": scale(-1),
    "layers.1.attn.indexer.chosen": lambda value, where: mx.minimum(value, 2),
    "layers.2.attn.rows": scale(-2),
    "layers.2.attn.visible": ablate(),
    "layers.1.attn.window_visible": lambda v, where: where.rows == where.positions[..., None],
    "layers.1.attn.weights.window": ablate(),
    "layers.1.attn.weights.compressed": scale(3),
    "layers.1.attn.out": ablate(),
    "layers.1.ffn.router.logits": scale(-1),
    "layers.1.ffn.router.choice": forbid_experts(1),
    "layers.1.ffn.router.weights": ablate_experts(0, 1),
    "layers.1.ffn.experts.hidden": add(0.1),
    "layers.1.ffn.experts.out": ablate(),
    "layers.1.streams": np.float32(1),
    "head.pre": scale(0.5),
    "head.in": scale(-1),
    "logits": ablate(),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("chunks", [[], [130, 3, 1, 1]], ids=["whole", "chunks and steps"])
def test_nothing_changes_before_the_position(small_model, usual, name, chunks):
    """A changed row counts from its last token on; 135 ends no group, so it is a row of 127's."""
    first = 127
    got = changed(
        small_model, {name: CHANGES[name]}, IDS[:140], chunks, positions=[first, 131, 135]
    )
    before, after = got[:first], got[first:]
    assert (before == usual[tuple(chunks)][:first]).all()
    assert (after != usual[tuple(chunks)][first:]).any()


def test_nor_does_any_other_quantity_reach_back(small_model, usual):
    """Values turned by one place along their last axis, at the position and after it."""
    turn, first, chunks = lambda value, where: mx.roll(value, 1, axis=-1), 127, (130, 3, 1, 1)
    names = {name for name, site in small_model.sites().items() if not site.fixed}
    for name in names - CHANGES.keys():
        if name.startswith(("layers.1.", "head.")):
            got = changed(small_model, {name: turn}, IDS[:140], chunks, positions=range(first, 140))
            assert (got[:first] == usual[chunks][:first]).all(), name
            assert (got[first:] != usual[chunks][first:]).any(), name


@pytest.fixture(scope="module")
def usual(small_model):
    return {each: run_chunks(small_model, IDS[:140], each) for each in ((), (130, 3, 1, 1))}


def test_several_compose_in_their_order_and_leave(small_model, tmp_path):
    tokens, usual = mx.array(IDS[None, :20]), run(small_model, IDS[:20])
    before = graph(small_model(tokens), tmp_path / "before")
    name = "layers.1.ffn.out"
    with small_model.trace(name) as plainly:
        run(small_model, IDS[:20])
    with (
        small_model.intervene({name: add(1.0)}),
        small_model.trace(name) as between,
        small_model.intervene({name: scale(2)}),
        small_model.intervene({name: at([3], ablate())}),
        small_model.trace(name) as last,
    ):
        run(small_model, IDS[:20])
    want = np.array(plainly[name])
    assert (np.array(between[name]) == want + 1).all()
    want = 2 * (want + 1)
    want[:, 3] = 0
    assert (np.array(last[name]) == want).all()
    with pytest.raises(ZeroDivisionError), small_model.intervene({name: lambda v, where: 1 / 0}):
        run(small_model, IDS[:20])
    assert (run(small_model, IDS[:20]) == usual).all()
    assert graph(small_model(tokens), tmp_path / "after") == before


def test_a_block_that_a_generator_holds_open_ends_by_itself(small_model):
    """Whichever of two blocks ends first, the other one goes on, and nothing is left of either."""
    ids = IDS[:20]
    usual, other = run(small_model, ids), {"layers.1.ffn.out": ablate()}
    once = changed(small_model, other, ids)
    both = changed(small_model, {**other, "layers.0.ffn.out": scale(2)}, ids)

    def held(block):
        with block:
            yield

    inner = held(small_model.intervene(other))
    with small_model.intervene({"layers.0.ffn.out": scale(2)}), small_model.trace("logits"):
        next(inner)
        assert (run(small_model, ids) == both).all()
        assert in_force() == "nameless"
    assert (run(small_model, ids) == once).all() and in_force() == "nameless"
    inner.close()
    assert (run(small_model, ids) == usual).all() and not listened() and in_force() == ""


def test_a_function_is_told_where_it_is(small_model):
    told = []
    tell = lambda value, where: told.append((value.shape, where)) or value
    states = [small_model.make_cache() for _ in range(2)]
    small_model(mx.array(IDS[None, :3]), states[:1])
    with small_model.intervene({"layers.1.ffn.in": tell}):
        small_model([IDS[:5], IDS[:5]], states)
        small_model([IDS[:2], IDS[:4]], states)
        small_model.step([7, 8], states)
    shapes = [(shape[:2], where.sequence.tolist()) for shape, where in told]
    assert shapes == [((2, 5), [0, 1]), ((1, 2), [0]), ((1, 4), [1]), ((2, 1), [0, 1])]
    positions = [where.positions.tolist() for _, where in told]
    assert positions[0] == [[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]] and positions[3] == [[10], [9]]


def test_a_run_patched_with_another_goes_on_like_it(small_model):
    """What is left of the run itself is the token ids, which choose experts in the first layer only."""
    other, name = IDS[100:130], "layers.2.streams"
    with small_model.trace(name) as t:
        want = run(small_model, other)
    assert (changed(small_model, {name: patch(t)}, IDS[:30]) == want).all()
    got = changed(small_model, {name: patch(t)}, IDS[:30], positions=[12])
    mixed = run(small_model, IDS[:30])
    mixed[12] = want[12]
    assert (got == mixed).all()


def test_projections(small_model):
    name, direction = "layers.1.streams", mx.array(np.random.default_rng(1).normal(size=128))
    with small_model.intervene({name: project_out(direction)}), small_model.trace(name) as t:
        run(small_model, IDS[:10])
    along = np.array(t[name]) @ np.array(direction)
    assert np.abs(along).max() < 1e-4
    with pytest.raises(DataError, match="direction of length 0"):
        project_out(mx.zeros(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.1.ffn.outs": ablate()}, r"near: layers\.1\.ffn\.out"),
        ({"layers.1.attn.weights.rows": ablate()}, "only says what other quantities are about"),
        ({"layers.1.ffn.out": mx.zeros((7,))}, r"ffn\.out must stay \(1, 9, 128\), and .* \(7,\)"),
        ({"layers.1.ffn.out": lambda v, where: "x"}, "cannot become"),
        (
            {"layers.1.ffn.out": ablate_experts(1)},
            r"belongs at ffn\.router\.weights, not at layers",
        ),
        ({"layers.1.ffn.router.weights": force_experts(1)}, r"belongs at ffn\.router\.choice"),
        ({"layers.1.ffn.router.choice": force_experts(9)}, "experts 0 to 3, not all of"),
        ({"layers.1.ffn.router.weights": ablate_experts(2, 99)}, r"to 3, not all of \(2, 99\)"),
        ({"layers.1.ffn.router.experts": np.int32(4)}, r"router\.experts has .* 0 to 3 .*\[4\]"),
        ({"layers.0.ffn.router.experts": lambda v, where: v - 9}, r"from 0 to 3 here, not \[-9"),
        (
            {"layers.1.attn.indexer.chosen": np.int32(2)},
            r"chosen has numbers from -1 to 1 h.*\[2\]",
        ),
        ({"layers.1.attn.indexer.chosen": np.int32(-2)}, r"from -1 to 1 here, not \[-2\]"),
        ({"layers.1.attn.rows": hide_rows(1)}, r"belongs at attn\.visible"),
        ({"layers.1.attn.visible": force_rows(1)}, r"belongs at attn\.indexer\.scores"),
    ],
)
def test_what_cannot_be_done_is_said(small_model, changes, message):
    with pytest.raises(DataError, match=message), small_model.intervene(changes):
        run(small_model, IDS[:9])


def test_numbers_of_experts_and_rows_that_are_there_will_do(small_model):
    """The last ones, -1 for no row, and others at positions that are not changed."""
    last = {"layers.1.ffn.router.experts": np.int32(3), "layers.1.attn.indexer.chosen": np.int32(1)}
    with small_model.intervene(last), small_model.trace(*last) as t:
        run(small_model, IDS[:9])
    assert all((np.array(t[name]) == value).all() for name, value in last.items())
    none = {"layers.1.attn.indexer.chosen": np.int32(-1)}
    with small_model.intervene(none), small_model.trace("layers.1.attn.weights.rows") as t:
        run(small_model, IDS[:9])
    assert (np.array(t["layers.1.attn.weights.rows"]) == -1).all()
    with pytest.raises(DataError, match="from 0 on"):
        ablate_experts(-1)
