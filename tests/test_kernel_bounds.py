"""What kernels take: at each bound and one past it, and where a call is cut."""

import mlx.core as mx
import numpy as np
import pytest

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.custom_kernels.layer import hyper_before, hyper_post, router
from ds4mlx.custom_kernels.products import dense, experts
from ds4mlx.model.linear import ExpertStack, Linear
from ds4mlx.model.moe import RoutedExperts


@pytest.fixture(autouse=True)
def wanted(monkeypatch):
    """Kernels as if there were a GPU; nothing here is launched."""
    monkeypatch.setattr(dialect, "target", lambda: "cuda")
    with dispatch.kernels():
        yield


def taken(count=8, rows=128, columns=128, topk=2, stored="mxfp4", dtype=mx.float32, tokens=1):
    """Whether kernels multiply by a stack of these sizes; its arrays are never made."""
    stack = experts.Operand(stored, {}, (count, rows, columns))
    x, chosen = mx.zeros((tokens, columns), dtype), mx.zeros((tokens, topk), mx.int32)
    return experts.takes(experts.UP, stack, x, chosen)


@pytest.mark.parametrize(
    "inside, outside",
    [
        ({"topk": 32}, {"topk": 33}),
        ({"count": 1024}, {"count": 1025}),
        ({"rows": 192}, {"rows": 160}),
        ({"columns": 192}, {"columns": 160}),
        ({"columns": 192, "tokens": 9}, {"columns": 192, "tokens": 9, "dtype": mx.bfloat16}),
        ({"stored": "q2_k"}, {"stored": "q8_0"}),
        ({"dtype": mx.bfloat16}, {"dtype": mx.float16}),
        ({"tokens": 1}, {"tokens": 0}),
    ],
)
def test_experts(inside, outside):
    assert taken(**inside) and not taken(**outside)


@pytest.mark.parametrize(
    "inside, outside",
    [
        ((8, 64, 256, 6), (9, 64, 256, 6)),
        ((1, 64, 256, 6), (0, 64, 256, 6)),
        ((1, 72, 256, 6), (1, 68, 256, 6)),
        ((1, 64, 1024, 6), (1, 64, 1025, 6)),
        ((1, 64, 256, 32), (1, 64, 256, 33)),
    ],
)
def test_router(inside, outside):
    def takes(tokens, width, count, topk):
        return router.takes(mx.zeros((tokens, width)), mx.zeros((count, width)), topk)

    assert takes(*inside) and not takes(*outside)


@pytest.mark.parametrize(
    "inside, outside", [((65535, 4, 72), (65536, 4, 72)), ((1, 4, 72), (1, 4, 68))]
)
def test_streams_before(inside, outside):
    assert hyper_before.takes(mx.zeros(inside)) and not hyper_before.takes(mx.zeros(outside))


def test_other_numbers_of_streams():
    for streams in (mx.zeros((1, n, 64)) for n in (3, 5)):
        assert not hyper_before.takes(streams) and not hyper_post.takes(streams)
    assert hyper_post.takes(mx.zeros((9, 4, 72))) and not hyper_post.takes(mx.zeros((9, 4, 68)))


@pytest.mark.parametrize(
    "stored, rows, width, takes",
    [
        *(("q8_0", 9, 192, 1), ("q4_k", 9, 256, 1), ("f32", 9, 64, 0), ("mxfp8", 9, 64, 1)),
        *(("q8_0", 8, 160, 1), ("f32", 8, 64, 1), ("f32", 8, 62, 0), ("q4_k", 8, 256, 0)),
    ],
)
def test_dense(stored, rows, width, takes):
    assert dense.takes(stored, mx.zeros((rows, width))) == takes
    assert dense.takes(stored, mx.zeros((3, rows, width))) == takes


def test_elements_are_numbered_in_32_bits_and_grids_end():
    for elements in (1, 65536, 65537, 4 * 4096, 6 * 4096, 1 << 31, 1 << 33):
        most = dispatch.most_tokens(elements)
        assert most == 1 or (most * elements <= 1 << 32 and most <= 65535)
    assert dispatch.most_tokens(65537) == 65535 and dispatch.most_tokens(65538) == 65534


class Launches(list):
    """Stands where a kernel is launched: how many tokens it was given."""

    def __call__(self, x, *others):
        self.append(x.shape[-2] if x.ndim == 3 and not others else x.shape[0])
        return x


def test_streams_after_are_made_in_pieces(monkeypatch):
    launched = Launches()
    monkeypatch.setattr(hyper_post, "by_kernel", launched)
    for count in (65535, 65536, 262145):
        sides = mx.zeros((count, 4, 8)), mx.zeros((count, 8)), mx.zeros((count, 4))
        out = hyper_post.after_sublayer(*sides, mx.zeros((count, 4, 4)))
        assert out.shape == (count, 4, 8)
    wide = mx.zeros((262144, 4, 1 << 13))  # never evaluated
    hyper_post.after_sublayer(wide, wide[:, 0], wide[:, :, 0], wide[:, :, :4])
    assert launched == [65535, 65535, 1, *[65535] * 4, 5, *[65535] * 4, 4]
    launched.clear()
    wide = mx.zeros((8, 4, 1 << 28))
    hyper_post.after_sublayer(wide, wide[:, 0], wide[:, :, 0], wide[:, :, :4])
    assert launched == [4, 4]


def test_pieces_give_what_one_call_gives():
    x, y = mx.random.normal((7, 3)), mx.random.normal((7,))
    whole = dispatch.in_pieces(lambda a, b: a * b[:, None], 7, x, y)
    for most in (1, 2, 6):
        assert mx.array_equal(dispatch.in_pieces(lambda a, b: a * b[:, None], most, x, y), whole)


class Added(ExpertStack):
    """A stack whose product has more to it, as an adapter's has."""

    def __call__(self, x, experts, ordered=False):
        return super().__call__(x, experts, ordered) + 1


def test_a_stack_with_a_product_of_its_own_is_called(monkeypatch):
    """It loses the kernels of its own half only; whatever offers an operand keeps them."""
    config = ModelConfig(
        hidden_size=64, moe_intermediate_size=64, n_routed_experts=4, num_experts_per_tok=2
    )
    module = RoutedExperts(config)
    for stack in (module.w1, module.w2, module.w3):
        stack.store("mxfp4")
    x, chosen = mx.zeros((1, 64)), mx.array([[0, 1]])

    def halves():
        up = experts.operands(experts.UP, x, chosen, module.w1, module.w3)
        return len(up), len(experts.operands(experts.DOWN, x, chosen, module.w2))

    assert halves() == (2, 1)
    stored, module.w1 = module.w1, Added(4, 64, 64)
    module.w1.store("mxfp4")
    assert halves() == (0, 1)
    with dispatch.plain_operations():
        # Zero weights: gate is 1 by the addition, up is 0.
        assert module(x, chosen, mx.ones((1, 2))).tolist() == [[0.0] * 64]
    Added.operand = stored.operand
    try:
        assert halves() == (2, 1)
    finally:
        del Added.operand
    module.w3.store("f32")
    assert halves() == (0, 1)


def test_a_half_without_kernels_meets_a_half_with_them(monkeypatch):
    """Both ways of ordering the pairs are the same to both halves."""
    config = ModelConfig(
        hidden_size=64, moe_intermediate_size=64, n_routed_experts=4, num_experts_per_tok=2
    )
    module = RoutedExperts(config)
    for seed, stack in enumerate((module.w1, module.w2, module.w3)):
        stack.weight = mx.random.normal(stack.weight.shape, key=mx.random.key(seed)) / 8
    monkeypatch.setattr(dialect, "target", lambda: None)
    for tokens in (3, 9, 40):
        x = mx.random.normal((tokens, 64))
        chosen = mx.array(np.random.default_rng(0).integers(0, 4, (tokens, 2)))
        weights = mx.ones((tokens, 2))
        ways = [experts.Pairs(chosen, None)]
        ways.append(experts.Pairs(chosen, mx.argsort(chosen.flatten())))
        outs = []
        for pairs in ways:
            hidden = experts.plain_up(module.w1, module.w3, x, pairs, weights, 7.0)
            outs.append(np.array(experts.plain_down(module.w2, hidden, pairs)))
        np.testing.assert_allclose(*outs, rtol=1e-4, atol=1e-5)


def test_a_matrix_keeps_no_planes_of_an_earlier_format():
    linear = Linear(32, 64)
    for stored, planes in (("mxfp4", 2), ("f32", 1), ("q8_0", 2), ("bf16", 1)):
        linear.store(stored)
        assert len(linear.parameters()) == planes and set(linear.parameters()) == set(linear.planes)
    assert repr(linear) == "Linear(32, 64, bf16)"
