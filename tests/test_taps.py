"""Named quantities of a running model: heard, replaced, and free of charge where nobody listens."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from reference import run

from ds4mlx.errors import DataError
from ds4mlx.model.taps import ATTENDED, Listener, listening

IDS = np.random.default_rng(5).integers(0, 288, 400)


class Heard(Listener):
    """Keeps what it wants, and puts in its place what `replace` makes of it."""

    def __init__(self, wants=lambda name: True, replace=lambda name, value: value):
        self.wants, self.replace = wants, replace
        self.values, self.names, self.calls = {}, [], []

    def begins(self, batch):
        self.calls.append(len(batch.ids))

    def take(self, name, value, span):
        self.names.append(name)
        self.values.setdefault(name, []).append(value)
        return self.replace(name, value)


def graph(out, path):
    """How many operations an unevaluated array stands for."""
    mx.export_to_dot(str(path), out)
    return path.read_text().count("rect")


def reading(model):
    """A call without a state."""
    return model(mx.array(IDS[None, :9]))


def decoding(model):
    """A token after a prompt, and then another one; the prompt is part of what it stands for."""
    state = model.make_cache()
    first = [model(mx.array(IDS[None, :9]), state), model(mx.array(IDS[None, 9:10]), state)]
    return mx.concatenate([*first, model.step([int(IDS[10])], [state])[None]], axis=1)


@pytest.mark.parametrize("called", [reading, decoding])
def test_nothing_is_paid_where_nobody_listens(small_model, tmp_path, called):
    """A listener that replaces nothing adds no operation either, but for what is made or put in
    another order only where somebody wants it."""
    made = (*ATTENDED, "experts.hidden", "experts.each", "logits", "scores", "choice")
    before = graph(called(small_model), tmp_path / "before")
    with listening(Heard(lambda name: not name.endswith(made))):
        assert graph(called(small_model), tmp_path / "heard") == before > 500
    with listening(Heard(lambda name: False)):
        assert graph(called(small_model), tmp_path / "deaf") == before
    assert graph(called(small_model), tmp_path / "after") == before


def test_every_quantity_has_its_shape(small_model):
    config, count = small_model.args, 140
    width, streams = config.hidden_size, config.hc_mult
    with listening(Heard()) as _, listening(heard := Heard()):
        logits = small_model(mx.array(IDS[None, :count]))
    k, shapes = config.num_experts_per_tok, {name: v[0].shape for name, v in heard.values.items()}
    assert heard.calls == [count]
    assert shapes["embed"] == shapes["head.in"] == (count, width)
    assert shapes["logits"] == (count, config.vocab_size)
    for layer in range(config.num_hidden_layers):
        own = {
            n.removeprefix(f"layers.{layer}."): s for n, s in shapes.items() if f".{layer}." in n
        }
        for name in ("attn.in", "attn.out", "ffn.in", "ffn.out", "ffn.experts.out"):
            assert own[name] == (count, width), name
        assert own["streams"] == own["attn.streams"] == (count, streams, width)
        assert own["attn.window_rows"] == (count, config.head_dim)
        assert own["attn.query_latent"] == (count, config.q_lora_rank)
        assert own["ffn.router.experts"] == own["ffn.router.weights"] == (count, k)
        assert own["ffn.router.scores"] == (count, config.n_routed_experts)
        assert own["ffn.experts.hidden"] == (count, k, config.moe_intermediate_size)
        for site in ("hc_attn", "hc_ffn"):
            assert own[site + ".pre"] == own[site + ".post"] == (count, streams)
            assert own[site + ".comb"] == (count, streams, streams)
        ratio = config.ratio(layer)
        assert ("attn.rows" in own) == ("attn.visible" in own) == (ratio > 0)
        assert ("attn.indexer.rows" in own) == (ratio == 4)
        if ratio:
            assert own["attn.rows"][0] == count // ratio
        if ratio == 4:
            assert own["attn.indexer.chosen"][1] == config.index_topk
            assert own["attn.indexer.scores"][1] == count // 4
    assert (np.array(logits)[0] == np.array(heard.values["logits"][0])).all()


def test_in_prefill_in_decode_and_of_several_sequences(small_model):
    layer = [block.attn.ratio for block in small_model.layers].index(4)
    name, rows_name = "layers.1.streams", f"layers.{layer}.attn.rows"
    with listening(heard := Heard(lambda each: each in (name, rows_name))):
        states = [small_model.make_cache() for _ in range(2)]
        small_model([IDS[:20], IDS[20:51]], cache=states)
        small_model.step([5, 6], states)
    assert heard.calls == [51, 2]
    assert [value.shape[0] for value in heard.values[name]] == [51, 2]
    rows = [value.shape[0] for value in heard.values[rows_name]]
    assert rows == [20 // 4, 31 // 4, 21 // 4, 32 // 4]


@pytest.mark.parametrize("name", ["embed", "layers.1.attn.out", "layers.2.streams", "logits"])
def test_what_is_replaced_is_gone_on_with(small_model, name):
    usual = run(small_model, IDS[:30])
    with listening(Heard(lambda each: each == name, lambda _, value: value * 0)):
        changed = run(small_model, IDS[:30])
    assert (changed == 0).all() if name == "logits" else np.abs(changed - usual).max() > 1e-3
    assert (run(small_model, IDS[:30]) == usual).all()


def test_several_listeners_hear_in_turn(small_model):
    doubled = Heard(lambda name: name == "embed", lambda _, value: value * 2)
    with listening(first := Heard()), listening(doubled), listening(last := Heard()):
        small_model(mx.array(IDS[None, :3]))
    assert (np.array(last.values["embed"][0]) == 2 * np.array(first.values["embed"][0])).all()


def test_a_listener_hears_its_own_thread_alone(small_model):
    other = []

    def elsewhere():
        with listening(mine := Heard()):
            mx.eval(small_model(mx.array(IDS[None, :4])))
        other.append(mine.calls)

    with listening(heard := Heard()):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert heard.calls == [] and heard.names == []
        mx.eval(small_model(mx.array(IDS[None, :6])))
    mx.eval(small_model(mx.array(IDS[None, :5])))
    assert other == [[4]] and heard.calls == [6]


def test_a_listener_that_raises_leaves_the_state(exact_small):
    def refuse(name, value):
        raise DataError(name)

    state = exact_small.make_cache()
    mx.eval(exact_small.streams(mx.array(IDS[None, :9]), state))
    refusing = Heard(lambda name: name == "layers.2.ffn.out", refuse)
    with listening(refusing), pytest.raises(DataError, match=r"^layers\.2\.ffn\.out$"):
        exact_small(mx.array(IDS[None, :4]), state)
    assert state.offset == 9
    want = run(exact_small, IDS[:13])[9:]
    assert np.abs(run(exact_small, IDS[9:13], state) - want).max() <= 5e-5
