"""How much the routed experts of each layer matter: noise on their products, and what it does.

With noise of a relative square error e on the products of one layer's gate and up, or of its down, the
KL divergence of the model's predictions from its own without noise is about s e for small e, and s is
the sensitivity there. What rounding these experts will cost is then about s times the relative square
error that the rounding has.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

from ds4mlx.convert.choice import ROLES, Place
from ds4mlx.evaluation.agreement import divergence
from ds4mlx.evaluation.scoring import Mean, bar, logit_blocks
from ds4mlx.model.model import Model
from ds4mlx.model.module import Module

# The relative square error of the noise: about that of 2 bits.
NOISE = 0.05


class Noisy(Module):
    """A stack of experts with noise on its products, in proportion to each of them."""

    operand = None  # no kernel may multiply instead

    def __init__(self, stack: Any, seed: int):
        super().__init__()
        self._stack, self._key = stack, mx.random.key(seed)

    def __call__(self, x: mx.array, experts: mx.array, ordered: bool = False) -> mx.array:
        """As the stack's."""
        out = self._stack(x, experts, ordered).astype(mx.float32)
        self._key, own = mx.random.split(self._key)
        size = mx.sqrt(NOISE * mx.square(out).mean(-1, keepdims=True))
        return (out + size * mx.random.normal(out.shape, key=own)).astype(x.dtype)


@contextlib.contextmanager
def noise(model: Model, place: Place) -> Iterator[None]:
    """Inside the block the products at a place are noisy."""
    stacks = model.layers[place[0]].ffn.experts
    before = {part: getattr(stacks, part) for part in ROLES[place[1]]}
    try:
        for seed, part in enumerate(before):
            setattr(stacks, part, Noisy(before[part], seed))
        yield
    finally:
        for part, stack in before.items():
            setattr(stacks, part, stack)


def sensitivities(model: Model, sequences: Sequence[Sequence[int]]) -> dict[Place, Mean]:
    """Nats a token for a relative square error of 1, at every place, over sequences of ids.

    Each sequence is read once without noise, and once for every place.
    """
    found: dict[Place, list[np.ndarray]] = {
        place: [] for place in product(range(model.args.num_hidden_layers), ROLES)
    }
    with bar("sensitivity", (1 + len(found)) * sum(map(len, sequences))) as progress:
        for ids in sequences:
            exact = [logits for _, logits in logit_blocks(model, ids, progress)]
            for place, parts in found.items():
                with noise(model, place):
                    noisy = (logits for _, logits in logit_blocks(model, ids, progress))
                    pairs = zip(exact, noisy, strict=True)
                    parts += [divergence(*pair)[0] / NOISE for pair in pairs]
    return {place: Mean.of(np.concatenate(parts)) for place, parts in found.items()}
