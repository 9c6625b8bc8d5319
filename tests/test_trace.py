"""Recording quantities of a running model: their values, shapes and names."""

import mlx.core as mx
import numpy as np
import pytest
from reference import run, run_chunks
from refmodel import RefModel

from ds4mlx import DataError, load
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.model.taps import BLOCK, HEAD
from ds4mlx.research.sites import matching

IDS = np.random.default_rng(5).integers(0, 288, 400)
CHUNKS = ([], [1, 2, 70, 62], [101, *[1] * 28])
# A recorded quantity of a layer, and what the NumPy model calls it.
NAMES = {
    "hc_attn.streams": "attn_streams",
    "hc_attn.pre": "attn_pre",
    "hc_attn.post": "attn_post",
    "hc_attn.comb": "attn_comb",
    "hc_attn.collapsed": "attn_collapsed",
    "hc_ffn.streams": "ffn_streams",
    "attn.streams": "ffn_streams",
    "hc_ffn.pre": "ffn_pre",
    "hc_ffn.post": "ffn_post",
    "hc_ffn.comb": "ffn_comb",
    "hc_ffn.collapsed": "ffn_collapsed",
    "attn.query_latent": "query_latent",
    "attn.out": "attn_out",
    "attn.indexer.scores": "index_scores",
    "ffn.router.logits": "router_logits",
    "ffn.router.choice": "router_scores",
    "ffn.shared_experts.out": "shared_out",
    "ffn.out": "ffn_out",
    "streams": "streams",
}


@pytest.fixture(scope="module")
def plain_model(small_dir):
    """The small model as plain float32 values, without rounding."""
    model = load(small_dir, dtype=mx.float32, rounding="none")[0]
    decode_weights(model)
    return model


def near(got, want, bound=1e-4):
    """Equal to a part of the largest value; -inf at the same places."""
    got, want = np.array(got).astype(np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert (np.isfinite(got) == np.isfinite(want)).all()
    shown = np.isfinite(want)
    most = max(np.abs(want[shown]).max(initial=0), 1e-9)
    return np.abs(got[shown] - want[shown]).max(initial=0) <= bound * most


def by_id(experts, values):
    """Values of each chosen expert in the order of the experts' numbers."""
    order = np.argsort(np.array(experts), axis=-1)
    values = np.array(values)
    order = order.reshape(*order.shape, *[1] * (values.ndim - order.ndim))
    return np.take_along_axis(values, order, axis=1)


@pytest.mark.parametrize(
    "chunks", [[], [3, 150, 120, *[1] * 20]], ids=["whole", "chunks and steps"]
)
def test_what_the_oracle_has_in_exact_mode(decoded_model, stored, chunks):
    oracle_agrees(decoded_model, stored, "p300/exact", stored["s700/ids"][:300], chunks, 1e-4)


def test_what_the_oracle_has_in_the_models_own_rounding(official_model, stored):
    """Rows are those that attention reads: rounded."""
    oracle_agrees(official_model, stored, "p129/kvsim", stored["s129/ids"], [100, *[1] * 10], 2e-3)


def oracle_agrees(model, stored, prompt, ids, chunks, bound):
    with model.trace("layers.*") as t:
        run_chunks(model, ids, chunks)
    of = lambda name, layer: stored[f"{prompt}/{name}.{layer}"]
    at = stored[f"{prompt}/selected_positions"].astype(int)
    for layer, block in enumerate(model.layers):
        got = lambda name, layer=layer: np.array(t[f"layers.{layer}.{name}"][0])
        assert near(got("streams")[at], of("streams", layer), bound)
        rms = np.sqrt((got("streams").astype(np.float64) ** 2).mean(-1))
        assert near(rms, of("streams_rms", layer), bound)
        assert near(got("attn.out")[at[-4:]], of("attn_out", layer), bound)
        assert near(got("ffn.out")[at[-4:]], of("ffn_out", layer), bound)
        assert near(got("attn.window_rows")[-4:], of("window_kv", layer), bound)
        experts = got("ffn.router.experts")
        assert (np.sort(experts) == of("experts", layer)).all()
        assert near(by_id(experts, got("ffn.router.weights")), of("expert_weights", layer), bound)
        if block.attn.ratio:
            assert near(got("attn.rows"), of("compressed_kv", layer), bound)
        if block.attn.ratio == 4:
            assert near(got("attn.indexer.rows"), of("index_kv", layer), bound)
            chosen = got("attn.indexer.chosen")
            assert (ascending(chosen) == of("topk", layer)).all()


def ascending(chosen):
    """Row numbers in their order, -1 at the end."""
    none = 1 << 30
    rows = np.sort(np.where(chosen < 0, none, chosen))
    return np.where(rows == none, -1, rows)


@pytest.mark.parametrize("chunks", CHUNKS, ids=["whole", "chunks", "steps"])
def test_what_the_float64_model_has(plain_model, small_source, chunks):
    reference = RefModel(str(small_source), angle_dtype=np.float32)
    ids = IDS[:135]
    _, want = reference.forward(ids)
    with plain_model.trace("**") as t:
        run_chunks(plain_model, ids, chunks)
    for layer, block in enumerate(plain_model.layers):
        site, ratio = f"layers.{layer}.", block.attn.ratio
        for name, key in NAMES.items():
            if f"{key}.{layer}" in want:
                assert near(t[site + name][0], want[f"{key}.{layer}"]), site + name
        assert shares_agree(t, site, want[f"attention.{layer}"], ratio)
        experts = t[site + "ffn.router.experts"][0]
        order = want[f"experts.{layer}"]
        each = by_id(experts, t[site + "ffn.experts.each"][0])
        assert near(each, by_id(order, want[f"expert_out.{layer}"]))
        out = np.array(t[site + "ffn.experts.out"][0])
        assert near(out, want[f"expert_out.{layer}"].sum(1))
    assert near(t["head.pre"][0], want["head_pre"])
    assert near(t["head.collapsed"][0], want["head_collapsed"])
    assert near(t["logits"][0], reference.forward(ids)[0])


def shares_agree(t, site, want, ratio):
    """Attention by distance and by row number, put where the NumPy model has it."""
    count, heads, _ = want.shape
    got = np.zeros(want.shape)
    query, head = np.arange(count)[:, None, None], np.arange(heads)[None, :, None]
    pairs = [(t[site + "attn.weights.positions"], t[site + "attn.weights.window"], 0)]
    if ratio:
        compressed = t[site + "attn.weights.rows"], t[site + "attn.weights.compressed"], count
        pairs.append(compressed)
    for rows, values, first in pairs:
        rows, values = np.array(rows[0]), np.array(values[0])
        assert (values[np.broadcast_to(rows[:, None] < 0, values.shape)] == 0).all()
        np.add.at(got, (query, head, first + np.maximum(rows, 0)[:, None]), values)
    sink = np.array(t[site + "attn.weights.sink"][0])
    return near(got, want) and near(sink, 1 - want.sum(-1))


def test_names(small_model):
    known = small_model.sites()
    layers = range(small_model.args.num_hidden_layers)
    whole = {name.split(".", 2)[2] for name in known if name.startswith("layers.")}
    assert whole == set(BLOCK) and set(HEAD) <= known.keys()
    assert not [a for a in known for b in known if b.startswith(a + ".")]
    find = lambda *patterns: matching(patterns, known)
    assert find("layers.*.streams") == [f"layers.{i}.streams" for i in layers]
    assert find("layers.1.ffn.router") == [n for n in known if n.startswith("layers.1.ffn.router.")]
    assert find("layers.2.**.streams") == [
        f"layers.2.{n}streams" for n in ("hc_attn.", "attn.", "hc_ffn.", "")
    ]
    assert find("**") == find("*") == list(known)
    assert find("layers.1.*.out") == ["layers.1.attn.out", "layers.1.ffn.out"]
    assert find("layers.*.attn.rows") == ["layers.1.attn.rows", "layers.2.attn.rows"]
    for pattern, near_ in {
        "layers.1.attn.output": "layers.1.attn.out",
        "layers.0.attn.rows": "layers.1.attn.rows",
        "layers.9.streams": "layers.2.streams",
        "logit": "logits",
        "": "embed",
    }.items():
        with pytest.raises(DataError, match=f"names no quantity of this model; near: .*{near_}"):
            small_model.trace(pattern)
    with pytest.raises(DataError, match="needs the name of a quantity"):
        small_model.trace()
    with pytest.raises(DataError, match="positions must be whole numbers"):
        small_model.trace("logits", positions=[-1])


def test_every_shape_and_type_is_as_said(small_dir):
    model = load(small_dir, dtype=mx.bfloat16)[0]
    with model.trace("**") as t:
        state = model.make_cache()
        streams = model.streams(mx.array(IDS[None, :130]), state)
        model.draft(streams[:, :-1], mx.array(IDS[None, 1:130]), state)
        model(mx.array(IDS[None, 130:132]), state)
    assert set(t) == set(model.sites())
    for name, site in model.sites().items():
        value = t[name]
        assert value.dtype == site.dtype, name
        assert value.ndim == len(site.shape), name
        sized = zip(value.shape, site.shape, strict=True)
        assert all(a == b for a, b in sized if isinstance(b, int)), name


def test_several_sequences_at_their_own_depths(small_model):
    states = [small_model.make_cache() for _ in range(2)]
    names = "layers.1.attn.rows", "layers.1.streams", "layers.1.attn.indexer", "logits"
    with small_model.trace(*names) as t:
        small_model([IDS[:20], IDS[20:71]], cache=states)
        small_model.step([5, 6], states)
    assert [rows.shape for rows in t["layers.1.attn.rows"]] == [(5, 128), (13, 128)]
    assert [each.shape[0] for each in t["layers.1.streams"]] == [21, 52]
    for number, ids in enumerate(([*IDS[:20], 5], [*IDS[20:71], 6])):
        with small_model.trace(*names) as alone:
            run(small_model, ids)
        for name in alone:
            one, other = t[name][number], alone[name][0]
            if name.endswith("chosen"):
                one, other = ascending(np.array(one)), ascending(np.array(other))
            assert near(one, other, 1e-5), name
    with small_model.trace("layers.1.streams", "layers.1.attn.rows") as t:
        small_model(mx.array(IDS[:40].reshape(2, 20)))
    assert t["layers.1.streams"].shape[:2] == (2, 20) and t["layers.1.attn.rows"].shape[:2] == (
        2,
        5,
    )


def test_positions(small_model):
    name, state = "layers.1.ffn.out", small_model.make_cache()
    with small_model.trace(name) as whole:
        run(small_model, IDS[:30])
    with small_model.trace(name, positions=[2, 11, 29]) as some:
        run_chunks(small_model, IDS[:30], [10, 10], state)
    assert near(some[name][0], np.array(whole[name][0])[[2, 11, 29]], 1e-5)
    ((places, _),) = some.sequences(name)
    assert places.tolist() == [2, 11, 29]


def test_what_belongs_to_no_whole_call_of_this_model(small_model, plain_model):
    """Another model, a call that fails, and the head alone are not recorded."""
    with small_model.trace("logits", "layers.0.streams") as t:
        run(plain_model, IDS[:7])
        refuse = {"layers.2.streams": lambda value, where: mx.zeros(3)}
        with small_model.intervene(refuse), pytest.raises(DataError, match=r"layers\.2\.streams"):
            run(small_model, IDS[:6])
        assert list(t) == []
        with pytest.raises(DataError, match="no call inside the block made 'logits'"):
            t["logits"]
        out = run(small_model, IDS[:5])
        again = small_model.logits(t["layers.0.streams"])
    assert (np.array(t["logits"][0]) == out).all() and again.shape == (1, 5, 288)
    with pytest.raises(DataError, match=r"no 'embed', but layers\.0\.streams, logits"):
        t["embed"]


def test_what_a_trace_has(exact_model):
    """Names of other layers and of nothing are not in it, and ask for no error."""
    with exact_model.trace("layers.0.attn.out") as seen:
        assert "layers.0.attn.out" not in seen
        exact_model(mx.array([[1, 2, 3]]))
    assert "layers.0.attn.out" in seen and "layers.1.attn.out" not in seen and 3 not in seen
