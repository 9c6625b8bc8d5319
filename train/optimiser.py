"""Muon for the matrices inside the blocks, Adam for everything else; one learning-rate factor.

Muon replaces a matrix's momentum by the nearest semi-orthogonal matrix (five Newton-Schulz steps in
bfloat16), scaled so that an update's root mean square is like Adam's. The factor is a tensor, so that
a recorded step can be repeated with another.
"""

import torch
from torch import Tensor

Weights = dict[str, Tensor]

# Coefficients of the odd quintic that drives singular values towards 1 (Keller Jordan's).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MUON_RATE, DECAY = 4e-3, 0.1
TABLE_RATE, ADAM_RATE = 4e-3, 2e-3  # of embedding and head, and of what else Adam moves
ADAM_PARTS = ("embed", "head", "norm", ".gate.weight", "hc_", "ape", "attn_sink", "weights_proj")


def uses_muon(name: str, weight: Tensor) -> bool:
    """Whether a weight is a matrix, or a stack of them, between two hidden vectors."""
    return weight.ndim >= 2 and not any(part in name for part in ADAM_PARTS)


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to (K, rows, columns), about."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x if wide else x.mT).float()


class Optimiser:
    """Steps `weights` in place by their `.grad`, then clears it."""

    def __init__(self, weights: Weights, groups: int):
        self.weights, self.groups = weights, groups
        self.muon = {n: w for n, w in weights.items() if uses_muon(n, w)}
        self.momentum = {n: torch.zeros_like(w) for n, w in self.muon.items()}
        tables = [w for n, w in weights.items() if n in ("embed.weight", "head.weight")]
        rest = [
            w
            for n, w in weights.items()
            if n not in self.muon and n not in ("embed.weight", "head.weight")
        ]
        self.factor = torch.zeros((), device=rest[0].device)
        self.rates = [torch.zeros_like(self.factor) for _ in (tables, rest)]
        groups_of = zip((tables, rest), self.rates, strict=True)
        self.adam = torch.optim.Adam(
            [{"params": params, "lr": rate} for params, rate in groups_of],
            betas=(0.9, 0.97),
            eps=1e-10,
            fused=True,
            capturable=rest[0].is_cuda,
        )

    def set_factor(self, factor: float) -> None:
        """Let the steps to come be at `factor` times the full rates."""
        self.factor.fill_(factor)

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for group, lr, rate in zip(
            self.adam.param_groups, self.rates, (TABLE_RATE, ADAM_RATE), strict=True
        ):
            group["lr"] = lr.copy_(self.factor * rate)
        self.adam.step()
        self._muon_step(self.factor * MUON_RATE)
        for weight in self.weights.values():
            weight.grad = None

    def _muon_step(self, rate: Tensor) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for name, weight in self.muon.items():
            if weight.grad is None:
                continue
            momentum = self.momentum[name].lerp_(weight.grad, 0.05)
            update = weight.grad.lerp(momentum, 0.95)
            for matrix, change in self._matrices(name, weight, update):
                by_shape.setdefault((*matrix.shape,), []).append((matrix, change))
        for shape, pairs in by_shape.items():
            changes = orthogonalised(torch.stack([change for _, change in pairs]))
            changes = (changes * (rate * (-0.2 * max(shape) ** 0.5))).unbind()
            matrices = [matrix for matrix, _ in pairs]
            torch._foreach_mul_(matrices, 1 - rate * DECAY)
            torch._foreach_add_(matrices, list(changes))

    def _matrices(self, name: str, weight: Tensor, update: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The matrices of a weight: stacked experts, or the output projection's groups, apart."""
        if name.endswith("wo_a.weight"):
            weight, update = (t.unflatten(0, (self.groups, -1)) for t in (weight, update))
        if weight.ndim == 2:
            return [(weight, update)]
        return list(zip(weight.unbind(), update.unbind(), strict=True))
