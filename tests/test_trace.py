"""Recording quantities of a running model: names, shapes, and which calls and tokens they are of."""

import mlx.core as mx
import numpy as np
import pytest
from reference import run, run_chunks
from test_recorded_values import ascending, near

from ds4mlx import DataError, load
from ds4mlx.model.taps import BLOCK, HEAD
from ds4mlx.research.sites import matching

IDS = np.random.default_rng(5).integers(0, 288, 400)


@pytest.fixture(scope="module")
def plain_model(small_dir):
    """Another model than the small one."""
    return load(small_dir, dtype=mx.float32, rounding="none")[0]


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


def test_several_sequences_at_their_own_depths(exact_small):
    states = [exact_small.make_cache() for _ in range(2)]
    names = "layers.1.attn.rows", "layers.1.streams", "layers.1.attn.indexer", "logits"
    with exact_small.trace(*names) as t:
        exact_small([IDS[:20], IDS[20:71]], cache=states)
        exact_small.step([5, 6], states)
    assert [rows.shape for rows in t["layers.1.attn.rows"]] == [(5, 128), (13, 128)]
    assert [each.shape[0] for each in t["layers.1.streams"]] == [21, 52]
    for number, ids in enumerate(([*IDS[:20], 5], [*IDS[20:71], 6])):
        with exact_small.trace(*names) as alone:
            run(exact_small, ids)
        for name in alone:
            one, other = t[name][number], alone[name][0]
            if name.endswith("chosen"):
                one, other = ascending(np.array(one)), ascending(np.array(other))
            assert near(one, other, 1e-5), name
    with exact_small.trace("layers.1.streams", "layers.1.attn.rows") as t:
        exact_small(mx.array(IDS[:40].reshape(2, 20)))
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
