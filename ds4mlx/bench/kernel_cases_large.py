"""Comparisons at Flash's own shapes, which take a GPU: whole layers of experts, dense matrices."""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.cases import dense_matvec
from ds4mlx.custom_kernels.cases import modules as cases
from ds4mlx.custom_kernels.cases.base import Case, Pairs, normal
from ds4mlx.custom_kernels.cases.decode import values
from ds4mlx.custom_kernels.products.dense import DECODED
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.model.moe import RoutedExperts


def layer(dtype: mx.Dtype, format: tuple[str, str], tokens: int) -> Pairs:
    """A whole layer of Flash's experts, fewer of them, through its kernels and in float32 without."""
    config = ModelConfig(n_routed_experts=24)
    module = RoutedExperts(config)
    for seed, name in enumerate(("w1", "w3", "w2")):
        stack, kind = module[name], format[name == "w2"]
        stack.store(kind)
        stack.update(random_planes(kind, stack._shape, seed))
    x, k = normal((tokens, config.hidden_size), dtype, 5), config.num_experts_per_tok
    order = mx.argsort(mx.random.uniform(shape=(tokens, 24), key=mx.random.key(6)), axis=-1)
    experts, weights = order[:, :k].astype(mx.int32), mx.full((tokens, k), 0.25)
    with dispatch.kernels():
        got = module(x, experts, weights)
    with dispatch.plain_operations():
        return [(got, module(x.astype(mx.float32), experts, weights))]


def large_cases() -> Iterator[Case]:
    """Flash's own shapes, which take a GPU."""
    for dtype in (mx.float32, mx.bfloat16):
        for tokens in (1, 8, 700):
            for format in zip(cases.UP, cases.DOWN, strict=True):
                name = f"{'/'.join(format)} experts of Flash, {tokens} tokens"
                yield Case(name, dtype, partial(layer, dtype, format, tokens))
        for kind in dense_matvec.KINDS:
            for tokens in (1, 4, 8):
                call = partial(dense_matvec.products, dtype, [(kind, 4096)], 8192, tokens)
                yield Case(f"{kind} 4096x8192, {tokens} tokens", dtype, call)
        for kind in DECODED:
            yield Case(
                f"decode {kind} 4096x8192", dtype, partial(values, kind, dtype, (4096, 8192))
            )
        yield Case("router 256x4096", dtype, partial(cases.route, dtype, 256, 4096, 8, False))
        yield Case("hyper_post 4096, 8 tokens", dtype, partial(cases.post, dtype, 4096, 8))
