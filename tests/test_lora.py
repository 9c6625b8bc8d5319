"""Adapters: what they add, and what is trained of them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from spoiling import on_metal
from test_synth import SMALL

from ds4mlx import DataError, load
from ds4mlx.bench.synth import synth_model
from ds4mlx.convert import quantize
from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.products import trained
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.engine.adapters import ATTENTION, ROUTED, SHARED
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.formats import FORMATS
from ds4mlx.model.fused.choice import by_modules
from ds4mlx.model.linear import projections
from ds4mlx.research import add_lora, remove_lora

IDS = mx.array(np.random.default_rng(5).integers(0, 288, (2, 40)))


@pytest.fixture
def model(small_dir):
    return load(small_dir, dtype=mx.float32, rounding="none")[0]


def fill(model, seed=1):
    """Give every adapter values that matter."""
    for number, (_, matrix) in enumerate(sorted(projections(model).items())):
        if matrix.adapted:
            key = mx.random.key(100 * seed + number)
            matrix.lora_b = 0.02 * mx.random.normal(matrix.lora_b.shape, key=key)


def merged(model):
    """Hold the values of each adapted matrix with its adapter's in them."""
    for matrix in projections(model).values():
        if matrix.adapted:
            values = matrix.decode() + matrix.scale * (matrix.lora_a @ matrix.lora_b).T
            matrix.store("f32")
            matrix.weight = values
    remove_lora(model)


@pytest.mark.parametrize("routed", [False, True])
def test_an_adapter_is_a_change_of_the_matrix(model, routed):
    before = model(IDS)
    add_lora(model, rank=4, routed=routed)
    assert (model(IDS) == before).all()
    fill(model)
    adapted = model(IDS)
    assert mx.abs(adapted - before).max() > 1e-2
    merged(model)
    assert mx.allclose(model(IDS), adapted, rtol=1e-4, atol=1e-4)


def test_what_is_trained(model):
    add_lora(model, rank=4, layers=[1, 2], routed=True)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    wanted = [f"layers.{n}.{key}" for n in (1, 2) for key in ATTENTION + SHARED + ROUTED]
    assert names == {f"{name}.{part}" for name in wanted for part in ("lora_a", "lora_b")}
    with pytest.raises(DataError, match=r"layers\.3\.attn\.wq_a: the model has no such matrix"):
        add_lora(model, layers=[3])
    with pytest.raises(DataError, match=r"layers\.0\.attn_norm: "):
        add_lora(model, keys=["attn_norm"])


def test_adapted_blocks_go_through_their_modules(model):
    assert not by_modules(model.layers)
    for number, keys in enumerate((["attn.wo_a"], ["ffn.experts.w2"], None)):
        add_lora(model, layers=[number], keys=keys)
        assert by_modules(model.layers) == {number}
        remove_lora(model)
    assert not by_modules(model.layers)


def loss(model, ids):
    return nn.losses.cross_entropy(model(ids)[:, :-1], ids[:, 1:]).mean()


def test_training_gives_what_reading_gives():
    """Values and gradients, with experts at 2 bits."""
    model = synth_model(SMALL, "q2", mx.float32)
    add_lora(model, rank=4, routed=True)
    fill(model)
    found = []
    for training in (False, True):
        model.train(training)
        value, gradients = nn.value_and_grad(model, loss)(model, IDS)
        found.append((value, dict(tree_flatten(gradients))))
    (value, gradients), (again, others) = found
    assert mx.allclose(value, again, rtol=1e-5)
    for name, gradient in gradients.items():
        assert mx.allclose(gradient, others[name], rtol=1e-3, atol=1e-6), name
        assert mx.any(gradient).item(), name


@pytest.mark.parametrize("name", ["IQ2_XXS", "Q2_K", "Q4_K"])
@pytest.mark.parametrize("scratch", [1 << 20, 2 * 8 * 256, 1], ids=["all", "two", "one"])
def test_experts_in_training_a_few_at_a_time(monkeypatch, name, scratch):
    """Values, and the gradient of what comes in, also where nothing can be read on the host."""
    monkeypatch.setattr(trained, "SCRATCH", scratch)
    draws = np.random.default_rng(3)
    coded = quantize(draws.normal(size=(4 * 8, 256)).astype(np.float32), name)
    planes = {p: mx.array(a).reshape(4, 8, -1) for p, a in coded.planes.items()}
    values = FORMATS[coded.format].decode(planes)
    experts = mx.array(np.sort(draws.integers(0, 4, 24)))
    x = mx.array(draws.normal(size=(24, 1, 256)).astype(np.float32))
    weights = mx.array(draws.normal(size=(24, 1, 8)).astype(np.float32))

    def summed(x):
        return (trained.gather(coded.format, planes, x, experts, True) * weights).sum()

    want = (x @ values[experts].swapaxes(1, 2) * weights).sum()
    assert mx.allclose(summed(x), want, rtol=1e-4)
    want = weights @ values[experts]
    with_host, traced = mx.grad(summed)(x), mx.compile(mx.grad(summed))(x)
    assert mx.allclose(with_host, want, rtol=1e-4, atol=1e-4)
    assert mx.allclose(traced, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_step_can_be_traced():
    """As mlx-lm's trainer has it; MLX compiles every group of operations by itself, for minutes."""
    model = synth_model(SMALL, "q2", mx.float32)
    add_lora(model, rank=4, layers=[2], keys=["ffn.experts.w2", "attn.wkv"])
    fill(model)
    model.train()
    step = nn.value_and_grad(model, loss)
    value, gradients = step(model, IDS[:, :12])
    traced, others = mx.compile(lambda ids: step(model, ids), inputs=model.state)(IDS[:, :12])
    assert mx.allclose(value, traced, rtol=1e-5)
    others = dict(tree_flatten(others))
    for name, gradient in tree_flatten(gradients):
        assert mx.allclose(gradient, others[name], rtol=1e-3, atol=1e-6), name


def test_gradients_of_adapters_against_finite_differences(model):
    """Along one direction for each kind of matrix and each half, in float32."""
    mx.random.seed(1)
    add_lora(model, rank=2, scale=1.0, layers=[1], routed=True)
    fill(model)
    decode_weights(model)
    ids = IDS[:, :16]
    found = dict(tree_flatten(nn.value_and_grad(model, loss)(model, ids)[1]))
    for name, matrix in projections(model).items():
        for part in ("lora_a", "lora_b") if matrix.adapted else ():
            kept, gradient = matrix[part], found[f"{name}.{part}"]
            way = gradient / mx.linalg.norm(gradient)
            ends = []
            for step in (0.05, -0.05):
                matrix[part] = kept + step * mx.linalg.norm(kept) * way
                ends.append(loss(model, ids).item())
            matrix[part] = kept
            slope = (ends[0] - ends[1]) / (0.1 * mx.linalg.norm(kept).item())
            assert mx.linalg.norm(gradient).item() == pytest.approx(slope, rel=0.02), (name, part)


@pytest.mark.parametrize("name", ["iq2_xxs", "q2_k", "mxfp4", "mxfp8"])
def test_kernels_decode_weights_in_training(name):
    """As on a GPU; no other kernel is used there, since none has a gradient."""
    planes = random_planes(name, (2, 64, 256), 1)
    values = FORMATS[name].decode(planes)
    x = mx.random.normal((64, 1, 256), key=mx.random.key(2))
    weights = mx.random.normal((64, 1, 64), key=mx.random.key(3))
    experts = mx.array([0] * 30 + [1] * 34)
    single = {plane: array[0] for plane, array in planes.items()}

    def routed(x):
        return (trained.gather(name, planes, x, experts, True) * weights).sum()

    def dense(x):
        return (trained.product(name, single, x.squeeze(1)) * weights.squeeze(1)).sum()

    with on_metal(), dispatch.kernels(), dispatch.training():
        assert not dispatch.active(x, "router") and dispatch.active(x, f"decode_{name}")
        for multiply, wanted in ((routed, values[experts]), (dense, values[:1])):
            assert mx.allclose(mx.grad(multiply)(x), weights @ wanted, rtol=1e-3, atol=1e-3)
