"""Every format: products equal those with the decoded values."""

import mlx.core as mx
import numpy as np
import pytest

from ds4mlx.config import ModelConfig
from ds4mlx.formats import FORMATS
from ds4mlx.model.linear import Embedding, ExpertStack, GroupedLinear, Linear
from ds4mlx.model.moe import RoutedExperts, swiglu

STORED = [name for name in FORMATS if name != "i32"]


def filled(module, format: str, seed: int = 0):
    """The module with random values in a format."""
    module.store(format)
    rng = np.random.default_rng(seed)
    for name, plane in FORMATS[module.format].empty(module._shape).items():
        if plane.dtype in (mx.uint32, mx.int8):
            raw = rng.integers(0, 256, (*plane.shape, plane.itemsize), np.uint8)
            if format == "mxfp8":
                raw[(raw & 0x7F) == 0x7F] = 0  # NaN in E4M3
            raw = raw.view({4: np.uint32, 1: np.int8}[plane.itemsize])
            module[name] = mx.array(raw[..., 0])
        elif plane.dtype == mx.uint8:
            module[name] = mx.array(rng.integers(115, 125, plane.shape, np.uint8))
        else:
            module[name] = mx.array(0.05 * rng.normal(size=plane.shape)).astype(plane.dtype)
    return module


def close(got, want):
    want = np.asarray(want)
    assert np.linalg.norm(np.array(got) - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("format", STORED)
def test_linear(format):
    linear = filled(Linear(48, 256), format)
    x = mx.random.normal((2, 3, 256))
    close(linear(x), np.array(x) @ np.array(linear.decode()).T)
    assert linear(x.astype(mx.bfloat16)).dtype == mx.bfloat16


@pytest.mark.parametrize("format", STORED)
def test_grouped_linear(format):
    linear = filled(GroupedLinear(3, 16, 256), format)
    x = mx.random.normal((2, 5, 3, 256))
    weight = np.array(linear.decode()).reshape(3, 16, 256)
    close(linear(x), np.einsum("blgi,goi->blgo", np.array(x), weight))
    assert linear(x.astype(mx.bfloat16)).dtype == mx.bfloat16


@pytest.mark.parametrize("format", STORED)
@pytest.mark.parametrize("ordered", [False, True])
def test_expert_stack(format, ordered):
    stack = filled(ExpertStack(5, 32, 256), format)
    experts = mx.array([0, 0, 2, 2, 4, 4, 4] if ordered else [4, 0, 2, 4, 0, 2, 4])
    x = mx.random.normal((7, 1, 256))
    weight = np.array(stack.decode())[np.array(experts)]
    close(stack(x, experts, ordered), np.einsum("nmi,noi->nmo", np.array(x), weight))


@pytest.mark.parametrize("format", STORED)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_routed_experts(format, tokens):
    """Both ways, pair by pair and sorted by expert, against a loop over experts."""
    config = ModelConfig(hidden_size=256, moe_intermediate_size=512, n_routed_experts=6)
    module = RoutedExperts(config)
    for i, stack in enumerate((module.w1, module.w2, module.w3)):
        filled(stack, format, i)
    rng = np.random.default_rng(tokens)
    x = rng.normal(size=(tokens, 256)).astype(np.float32)
    experts = np.stack([rng.permutation(5)[:4] for _ in range(tokens)])  # expert 5 gets no token
    weights = rng.random((tokens, 4)).astype(np.float32)
    w1, w2, w3 = (np.array(w.decode()) for w in (module.w1, module.w2, module.w3))
    want = np.zeros((tokens, 256))
    for t, slot in np.ndindex(experts.shape):
        e = experts[t, slot]
        hidden = np.array(swiglu(mx.array(w1[e] @ x[t]), mx.array(w3[e] @ x[t]), 10.0))
        want[t] += w2[e] @ (hidden * weights[t, slot])
    close(module(mx.array(x), mx.array(experts), mx.array(weights)), want)


@pytest.mark.parametrize("format", STORED)
def test_embedding(format):
    embedding = filled(Embedding(20, 256), format)
    ids = mx.array([[3, 0, 19], [3, 3, 1]])
    want = np.array(embedding.decode())[np.array(ids)]
    assert np.array_equal(np.array(embedding(ids).astype(mx.float32)), want)


@pytest.mark.parametrize("format", FORMATS)
def test_bits_and_widths_agree(format):
    """What a format says of its size is what its planes take."""
    planes = FORMATS[format].empty((3, 512))
    assert sum(plane.nbytes for plane in planes.values()) * 8 == FORMATS[format].bits * 3 * 512
    assert next(iter(planes)) == "weight"
