"""Every recorded quantity has the value that the oracle stored, or else that of the float64 model."""

import mlx.core as mx
import numpy as np
import pytest
from reference import run_chunks
from refmodel import RefModel

from ds4mlx import load
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.model.taps import site_of

IDS = np.random.default_rng(5).integers(0, 288, 135)
CHUNKS = ([], [1, 2, 70, 62], [101, *[1] * 28])
# A recorded quantity of a block, and what the NumPy model calls it.
BLOCK = {
    "hc_attn.streams": "attn_streams",
    "hc_attn.pre": "attn_pre",
    "hc_attn.post": "attn_post",
    "hc_attn.comb": "attn_comb",
    "hc_attn.collapsed": "attn_collapsed",
    "attn.in": "attn_in",
    "attn.query_latent": "query_latent",
    "attn.window_rows": "window_kv",
    "attn.rows": "compressed_kv",
    "attn.indexer.rows": "index_kv",
    "attn.visible": "visible",
    "attn.indexer.scores": "index_scores",
    "attn.out": "attn_out",
    "attn.streams": "ffn_streams",
    "hc_ffn.streams": "ffn_streams",
    "hc_ffn.pre": "ffn_pre",
    "hc_ffn.post": "ffn_post",
    "hc_ffn.comb": "ffn_comb",
    "hc_ffn.collapsed": "ffn_collapsed",
    "ffn.in": "ffn_in",
    "ffn.router.logits": "router_logits",
    "ffn.router.scores": "router_affinity",
    "ffn.router.choice": "router_scores",
    "ffn.shared_experts.out": "shared_out",
    "ffn.out": "ffn_out",
    "streams": "streams",
}
# Of each chosen expert, in whatever order.
EXPERTS = {
    "ffn.router.weights": "expert_weights",
    "ffn.experts.hidden": "expert_hidden",
    "ffn.experts.each": "expert_out",
}


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


def ascending(chosen):
    """Row numbers in their order, -1 at the end."""
    none = 1 << 30
    rows = np.sort(np.where(chosen < 0, none, chosen))
    return np.where(rows == none, -1, rows)


# What the oracle has


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


# What the float64 model has


@pytest.fixture(scope="module")
def plain_model(small_dir):
    """The small model as plain float32 values, without rounding."""
    model = load(small_dir, dtype=mx.float32, rounding="none")[0]
    decode_weights(model)
    return model


@pytest.fixture(scope="module")
def wanted(small_source):
    """What the float64 model makes of IDS, and of drafting after each of them."""
    reference = RefModel(str(small_source), angle_dtype=np.float32)
    logits, made = reference.forward(IDS)
    last = made["streams.2"]
    drafts = reference.mtp(last[:-1], IDS[1:])
    embeddings = reference.w["embed.weight"][IDS]
    made |= {"logits": logits, "embed": embeddings, "head_streams": last}
    own = {"logits": drafts, "embed": embeddings[1:], "head_streams": made["streams.3"]}
    return made | {f"mtp.0.{name}": value for name, value in own.items()}


def recorded(model, chunks):
    """Everything that the model makes of IDS in chunks, and then its draft block in such chunks."""
    with model.trace("**") as main:
        run_chunks(model, IDS, chunks)
    tokens, state, first = mx.array(IDS[None]), model.make_cache(), 0
    streams = model.streams(tokens, state)
    with model.trace("mtp.**") as drafts:
        for length in [*chunks, len(IDS)]:
            end = min(first + length, len(IDS) - 1)
            if end > first:
                model.draft(streams[:, first:end], tokens[:, first + 1 : end + 1], state)
            first = end
    return {name: np.array(value[0]) for t in (main, drafts) for name, value in t.items()}


@pytest.mark.parametrize("chunks", CHUNKS, ids=["whole", "chunks", "steps"])
def test_what_the_float64_model_has(plain_model, wanted, chunks):
    """Every quantity that has a name, of the draft block too."""
    got, config = recorded(plain_model, chunks), plain_model.args
    pairs = {}
    for prefix in ("", "mtp.0."):
        for name in ("embed", "logits"):
            pairs[prefix + name] = wanted[prefix + name]
        for name in ("streams", "pre", "collapsed", "in"):
            pairs[f"{prefix}head.{name}"] = wanted[f"{prefix}head_{name}"]
    agreed = set()
    for block in range(config.num_hidden_layers + 1):
        site, known = site_of(config, block), lambda key, block=block: wanted.get(f"{key}.{block}")
        pairs |= {site + name: known(key) for name, key in BLOCK.items() if known(key) is not None}
        agreed |= experts_agree(got, site, known) | shares_agree(got, site, known, block)
    for name, want in pairs.items():
        assert near(got[name], want), name
    assert got.keys() == plain_model.sites().keys() == agreed | pairs.keys()


def experts_agree(got, site, known):
    """What is chosen and made by the experts; the names that were compared."""
    experts, order = got[site + "ffn.router.experts"], known("experts")
    assert (np.sort(experts) == np.sort(order)).all()
    for name, key in EXPERTS.items():
        assert near(by_id(experts, got[site + name]), by_id(order, known(key))), site + name
    assert near(got[site + "ffn.experts.out"], known("expert_out").sum(1))
    choice = got[site + "ffn.router.choice"]
    best = np.argsort(-choice, axis=-1, kind="stable")[:, : experts.shape[1]]
    assert (np.sort(best) == np.sort(experts)).all()  # by a table too
    names = {*EXPERTS, "ffn.router.experts", "ffn.experts.out", "ffn.router.choice"}
    return {site + name for name in names}


def shares_agree(got, site, known, block):
    """Attention by distance and by row number, put where the NumPy model has it; the names compared."""
    want = known("attention")
    count, heads, _ = want.shape
    shares, token = np.zeros(want.shape), np.arange(count)[:, None]
    positions = got[site + "attn.weights.positions"]
    near_by = token - np.arange(positions.shape[1])[::-1]
    assert (positions == np.maximum(near_by, -1)).all()
    assert (got[site + "attn.window_visible"] == (near_by >= 0)).all()
    kinds = [("positions", "window", 0)]
    if known("compressed_kv") is not None:
        kinds.append(("rows", "compressed", count))
    for numbers, values, first in kinds:
        rows, values = got[f"{site}attn.weights.{numbers}"], got[f"{site}attn.weights.{values}"]
        assert (values[np.broadcast_to(rows[:, None] < 0, values.shape)] == 0).all()
        places = first + np.maximum(rows, 0)[:, None]
        np.add.at(shares, (token[..., None], np.arange(heads)[None, :, None], places), values)
    assert near(shares, want) and near(got[site + "attn.weights.sink"], 1 - want.sum(-1))
    names = {f"weights.{part}" for kind in kinds for part in kind[:2]}
    names |= {"window_visible", "weights.sink"}
    chosen = got.get(site + "attn.indexer.chosen")
    if chosen is not None:
        kept = known("selected")
        rows = np.where(kept, np.arange(kept.shape[1]), -1)
        most = np.sort(rows)[:, ::-1][:, : chosen.shape[1]]
        assert (ascending(chosen) == ascending(most)).all()
        names.add("indexer.chosen")
    return {f"{site}attn.{name}" for name in names}
