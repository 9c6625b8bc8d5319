"""The model through its kernels equals the model through plain operations."""

import sys
from contextvars import Context

import mlx.core as mx
import numpy as np
import pytest
from metalsim import metal_kernel
from reference import DATA

from ds4mlx import DataError, load
from ds4mlx.config import ModelConfig
from ds4mlx.convert import convert
from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.model.linear import GroupedLinear, Linear
from ds4mlx.model.moe import RoutedExperts


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    """Kernels run as on a Mac; what was launched, by name."""
    launched = []
    call = dialect.Kernel.__call__

    def noted(self, *arguments, **options):
        launched.append(self.name)
        return call(self, *arguments, **options)

    if sys.platform != "darwin":
        monkeypatch.setattr(dialect, "target", lambda: "metal")
        monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    monkeypatch.setattr(dialect.Kernel, "__call__", noted)
    with dispatch.kernels():
        yield launched


def fill(module, format: str, seed: int):
    module.store(format)
    module.update(random_planes(format, module._shape, seed))
    return module


def close(got: mx.array, want: mx.array, tolerance: float = 1e-5) -> None:
    got, want = np.array(got), np.array(want)
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("tokens", [1, 8, 9])
@pytest.mark.parametrize("format", [("iq2_xxs", "q2_k"), ("mxfp4", "mxfp4")])
def test_routed_experts(tokens, format, metal):
    config = ModelConfig(
        hidden_size=256, moe_intermediate_size=256, n_routed_experts=5, num_experts_per_tok=3
    )
    module = RoutedExperts(config)
    for seed, name in enumerate(("w1", "w3", "w2")):
        fill(module[name], format[name == "w2"], seed)
    rng = np.random.default_rng(tokens)
    x = mx.random.normal((tokens, 256))
    experts = mx.array(np.stack([rng.permutation(4)[:3] for _ in range(tokens)]))
    weights = mx.array(rng.random((tokens, 3)).astype(np.float32))
    got = module(x, experts, weights)
    assert len(metal) == (2 if tokens <= dispatch.FEW else 4)
    with dispatch.plain_operations():
        close(got, module(x, experts, weights))
    if tokens > dispatch.FEW:
        close(module(x.astype(mx.bfloat16), experts, weights), got, 1e-2)
        names = [f"experts_{side}_fragments_{format[side == 'down']}_32" for side in ("up", "down")]
        assert metal[4:] == ["expert_tiles", *names, "experts_sum"]


@pytest.mark.parametrize("length", [1, 12])
def test_q8_linear(length, metal):
    """Of two sequences: two tokens, or 24."""
    single, grouped = fill(Linear(48, 256), "q8_0", 0), fill(GroupedLinear(3, 16, 256), "q8_0", 1)
    x, parts = mx.random.normal((2, length, 256)), mx.random.normal((2, length, 3, 256))
    found = single(x), grouped(parts)
    assert metal == ["dense_matvec_q8_0" if length == 1 else "decode_q8_0_f32"] * 2
    with dispatch.plain_operations():
        close(found[0], single(x))
        close(found[1], grouped(parts))


@pytest.mark.parametrize("stored", ["mxfp8", "bf16", "f16", "f32"])
def test_few_rows_of_other_formats(stored, metal):
    """Widened nowhere, whatever the type of the activations; many rows take decoded values."""
    single, grouped = fill(Linear(48, 64), stored, 0), fill(GroupedLinear(3, 16, 64), stored, 1)
    x, parts = mx.random.normal((2, 4, 64)), mx.random.normal((2, 4, 3, 64))
    found = single(x), grouped(parts)
    assert metal == [f"dense_matvec_{stored}"] * 2
    assert single(x.astype(mx.bfloat16)).dtype == mx.bfloat16 and len(metal) == 3
    single(mx.concatenate([x, x]))
    assert metal[3:] == (["decode_mxfp8_f32"] if stored == "mxfp8" else [])
    with dispatch.plain_operations():
        close(found[0], single(x))
        close(found[1], grouped(parts))


def test_widths_that_do_not_suit_take_plain_operations(metal):
    linear = fill(Linear(16, 100), "f32", 0)
    x = mx.random.normal((9, 100))
    close(linear(x), x @ linear.decode().T)
    assert linear(x.astype(mx.float16)).dtype == mx.float16
    assert not metal


@pytest.mark.parametrize("target, used", [("cuda", "1 "), ("metal", "1"), (None, "")])
def test_where_kernels_are_used(target, used, monkeypatch):
    """`used`: the settings of DS4MLX_KERNELS with which they are; a space stands for none.

    Without a setting the verdict decides, which is good on CUDA here and bad on Metal.
    """
    x = mx.zeros((1,))
    monkeypatch.setattr(dialect, "target", lambda: target)
    for setting in "01 ":
        monkeypatch.setenv("DS4MLX_KERNELS", setting)
        if setting == " ":
            monkeypatch.delenv("DS4MLX_KERNELS")
        assert Context().run(dispatch.active, x, "router") == (setting in used)
        assert Context().run(dispatch.in_use) == (target is not None and setting != "0")
        with dispatch.kernels():
            assert dispatch.in_use() == (target is not None)
            with dispatch.plain_operations():
                assert not dispatch.in_use()
            assert dispatch.in_use() == (target is not None)


@pytest.mark.parametrize("said", ["off", " 0", "2", "true"])
def test_a_setting_that_says_neither_is_refused(said, monkeypatch):
    monkeypatch.setattr(dialect, "target", lambda: "metal")
    monkeypatch.setenv("DS4MLX_KERNELS", said)
    with pytest.raises(DataError, match=f"DS4MLX_KERNELS must be 0, 1 or empty, not '{said}'"):
        Context().run(dispatch.in_use)


@pytest.fixture(scope="module")
def q2(tmp_path_factory):
    path = tmp_path_factory.mktemp("q2") / "model"
    convert(DATA / "gguf" / "ds4-q2.gguf", path, progress=False)
    return load(path, dtype=mx.float32, rounding="none")[0]


def logits(model) -> mx.array:
    """Of a prompt of twelve tokens, then of two more."""
    tokens = mx.array([[3, 17, 255, 9, 40, 41, 42, 5, 6, 7, 100, 2]])
    cache = model.make_cache()
    steps = [model(tokens, cache=cache), model(tokens[:, 3:5], cache=cache)]
    return mx.concatenate(steps, axis=1)


def test_whole_model(q2, metal):
    found = logits(q2)
    kinds = {name.removesuffix("_f32") for name in metal}
    assert {
        "router",
        "router_hashed",
        "hyper_mixes",
        "hyper_in",
        "hyper_post",
        "decode_q8_0",
    } <= kinds
    assert "attention_chunk" in kinds
    assert {"experts_up_iq2_xxs", "experts_down_sorted_q2_k", "dense_matvec_q8_0"} <= kinds
    with dispatch.plain_operations():
        assert float(mx.abs(found - logits(q2)).max()) <= 1e-4
