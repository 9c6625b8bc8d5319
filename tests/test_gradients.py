"""Gradients through the model: against finite differences of the float64 model, and the roundings."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from reference import run
from refmodel import RefModel

from ds4mlx import load
from ds4mlx.convert import quantize
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.formats import FORMATS
from ds4mlx.state.rounding import round_index
from ds4mlx.state.row_forms import StateForm

IDS = np.random.default_rng(5).integers(0, 288, 132)
FEW = 48  # tokens that give the indexer something to choose; an HCA row takes 128
STEP = 1e-5


def loss(model, ids):
    """How badly the next token is foretold, and by the draft block the one after it."""
    streams = model.streams(ids)
    main = nn.losses.cross_entropy(model.logits(streams)[:, :-1], ids[:, 1:]).mean()
    drafts = model.draft(streams[:, :-1], ids[:, 1:])[0]
    return main + nn.losses.cross_entropy(drafts[:, :-1], ids[:, 2:]).mean()


def reference_loss(reference, ids):
    logits, made = reference.forward(ids)
    drafts = reference.mtp(made["streams.2"][:-1], ids[1:])
    return entropy(logits[:-1], ids[1:]) + entropy(drafts[:-1], ids[2:])


def entropy(logits, wanted):
    return (np.logaddexp.reduce(logits, -1) - logits[np.arange(len(wanted)), wanted]).mean()


def exact(directory, dtype=mx.float32, rounding="none"):
    model = load(directory, dtype=dtype, rounding=rounding)[0]
    decode_weights(model)
    return model


def gradients(model, ids):
    """By the parameter's name."""
    value, found = nn.value_and_grad(model, loss)(model, mx.array(ids[None]))
    mx.eval(value, found)
    return dict(tree_flatten(found))


@pytest.fixture(scope="module")
def plain(small_dir):
    return exact(small_dir)


@pytest.fixture(scope="module")
def found(plain):
    return {count: gradients(plain, IDS[:count]) for count in (FEW, len(IDS))}


@pytest.fixture(scope="module")
def reference(small_source):
    return RefModel(str(small_source), angle_dtype=np.float32)


def kind(name):
    """A parameter's name without the number of its layer: the same in the draft block."""
    return ".".join(part for part in name.split(".") if not part.isdigit() and part not in PLACES)


PLACES = ("layers", "mtp")


def official(name):
    """The names in the reference model of a parameter, one for each expert."""
    name = name.replace("hc_attn.", "hc_attn_").replace("hc_ffn.", "hc_ffn_")
    name = name.replace("hc_head.", "hc_head_")
    if ".ffn.experts." not in name:
        return [name]
    return [name.replace(".experts.", f".experts.{e}.") for e in range(4)]


def test_every_kind_of_parameter_against_finite_differences(found, reference):
    """Along one direction for each kind, at once in all layers that have it."""
    kinds = {}
    for name in found[FEW]:
        kinds.setdefault(kind(name), []).append(name)
    assert len(kinds) > 35
    draws = np.random.default_rng(1)
    for each, names in kinds.items():
        hca = each.startswith("attn.compressor.")
        ids = IDS if hca else IDS[:FEW]
        moved, along, size = {}, 0.0, 0.0
        for name in names:
            gradient = np.array(found[len(ids)][name].astype(mx.float32), np.float64)
            places = official(name)
            stacked = gradient if len(places) > 1 else gradient[None]
            for place, own in zip(places, stacked, strict=True):
                weight = reference.w[place]
                spread = np.sqrt((weight**2).mean()) or 1.0
                way = draws.normal(size=weight.shape) * spread
                moved[place] = weight, way
                along += (own * way).sum()
                size += (own**2).sum() * spread**2
        there, back = (
            reference_loss(shifted(reference, moved, sign * STEP), ids) for sign in (1, -1)
        )
        shifted(reference, moved, 0)
        measured = (there - back) / (2 * STEP)
        assert abs(along - measured) <= 2e-3 * max(abs(measured), np.sqrt(size)), each
        chooses = "indexer" in each or each == "ffn.gate.bias"
        assert (size == 0) == chooses, each  # what only chooses has no gradient


def shifted(reference, moved, step):
    """The reference model with weights moved by so much along their ways."""
    for place, (weight, way) in moved.items():
        reference.w[place] = weight + step * way if step else weight
    return reference


def test_full_gradients_of_the_trained_model(embedded_dir):
    """Every parameter but those that only choose moves the loss, and a step down all of them lowers it."""
    model = exact(embedded_dir, rounding="official")
    ids = mx.array(np.random.default_rng(3).integers(0, 3072, (1, 12)))
    value, found = nn.value_and_grad(model, loss)(model, ids)
    assert all(mx.isfinite(gradient).all().item() for _, gradient in tree_flatten(found))
    unmoved = {name for name, gradient in tree_flatten(found) if not mx.any(gradient).item()}
    chooses = {name for name, _ in tree_flatten(found) if "indexer" in name or "gate.bias" in name}
    late = "layers.3.attn.compressor."  # whose first row comes after 128 tokens
    assert {name for name in unmoved if not name.startswith(late)} == chooses
    down = tree_map(
        lambda weight, slope: weight - 1e-4 * slope, model.trainable_parameters(), found
    )
    model.update(down)
    assert loss(model, ids) < value


def test_codes_and_tables_are_not_trained(small_model):
    names = {name for name, _ in tree_flatten(small_model.trainable_parameters())}
    every = dict(tree_flatten(small_model.parameters()))
    assert names == {n for n, array in every.items() if mx.issubdtype(array.dtype, mx.floating)}
    assert "layers.0.ffn.gate.tid2eid" in every.keys() - names
    small_model.unfreeze()
    assert names == {name for name, _ in tree_flatten(small_model.trainable_parameters())}


def test_bfloat16_agrees_with_float32(small_dir, found):
    got = gradients(exact(small_dir, mx.bfloat16), IDS[:FEW])
    for name, want in found[FEW].items():
        assert mx.isfinite(got[name]).all().item(), name
        if mx.any(want).item():
            assert cosine(got[name], want) > 0.9, name


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_roundings_are_passed_straight_through(small_model, dtype):
    rows = mx.random.normal((5, 128), key=mx.random.key(1)).astype(dtype)
    weights = mx.random.normal(rows.shape, key=mx.random.key(2)).astype(dtype)
    packed = StateForm.of(small_model.args, dtype, "official")
    values = packed.of_values(dtype)
    for form, held in ((values.kv, packed.kv), (values.index, packed.index)):
        assert (form.unpack(form.pack(rows)) == held.unpack(held.pack(rows))).all()
        assert (form.pack(rows) != rows).any()
        through = mx.grad(lambda x, form=form: (form.unpack(form.pack(x)) * weights).sum())(rows)
        assert (through == weights).all() and through.dtype == dtype
    turned = mx.hadamard_transform(weights)
    through = mx.grad(lambda x: (round_index(x, "official") * weights).sum())(rows)
    assert mx.allclose(through, turned, rtol=1e-2, atol=1e-2)


def test_the_models_own_rounding(small_dir, found):
    """Values are those of states, whose rows are packed; gradients near those without rounding."""
    model = exact(small_dir, rounding="official")
    assert (run(model, IDS) == run(model, IDS, model.make_cache())).all()
    got = gradients(model, IDS[:FEW])
    cosines = [cosine(got[name], want) for name, want in found[FEW].items() if mx.any(want).item()]
    assert min(cosines) > 0.5 and np.median(cosines) > 0.95


def cosine(a, b):
    a, b = a.astype(mx.float32).flatten(), b.astype(mx.float32).flatten()
    return ((a * b).sum() / (mx.linalg.norm(a) * mx.linalg.norm(b))).item()


def test_a_gradient_of_what_is_put_in(plain):
    """Of a vector added by an intervention, against a step along it."""
    ids, wanted = mx.array(IDS[None, :20]), 7

    def score(vector):
        with plain.intervene({"layers.1.streams": lambda v, where: v + vector}, positions=[10]):
            return plain(ids)[0, -1, wanted]

    gradient = mx.grad(score)(mx.zeros(128))
    way = gradient / mx.linalg.norm(gradient)
    slope = (score(0.05 * way) - score(-0.05 * way)).item() / 0.1
    assert abs(slope - mx.linalg.norm(gradient).item()) < 0.02 * abs(slope)


def test_the_inputs_of_stored_weights_have_gradients(small_dir):
    """A norm's weight, below matrices that are held as codes."""
    coded, plain = load(small_dir, dtype=mx.float32, rounding="none")[0], exact(small_dir)
    names = [n for n, _ in tree_flatten(coded.trainable_parameters())]
    got, want = gradients(coded, IDS[:FEW]), gradients(plain, IDS[:FEW])
    for name in names:
        if mx.any(want[name]).item():
            assert cosine(got[name], want[name]) > 0.999, name


@pytest.mark.parametrize("name", ["IQ2_XXS", "Q2_K", "Q4_K"])
def test_the_inputs_of_coded_experts_have_gradients(name):
    """Of so many that each expert is decoded once, one after the other."""
    draws = np.random.default_rng(3)
    coded = quantize(draws.normal(size=(4 * 8, 256)).astype(np.float32), name)
    stored = FORMATS[coded.format]
    planes = {p: mx.array(a).reshape(4, 8, -1) for p, a in coded.planes.items()}
    experts, x = mx.array(draws.integers(0, 4, 24)), mx.array(draws.normal(size=(24, 1, 256)))
    weights = mx.array(draws.normal(size=(24, 1, 8)))
    got = mx.grad(lambda x: (stored.gather(planes, x, experts, False) * weights).sum())(x)
    assert mx.allclose(got, weights @ stored.decode(planes)[experts], rtol=1e-4, atol=1e-4)
