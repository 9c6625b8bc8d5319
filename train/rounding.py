"""The checkpoint's and the model's own roundings in PyTorch, with gradients passed straight through.

Values agree with `ds4mlx.state.rounding` and with the official formats; scales are powers of two.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

Nearest = Callable[[Tensor], Tensor]

FP8_MAX, FP4_MAX = 448.0, 6.0


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in the forward pass, the identity in the backward pass."""
    return x + (rounded - x).detach()


def power_of_two_at_least(x: Tensor) -> Tensor:
    """Smallest power of two >= x, for x > 0."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def e4m3(x: Tensor) -> Tensor:
    """Nearest FP8 value of |x| <= 448."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def e2m1(x: Tensor) -> Tensor:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with x's sign, for |x| <= 6; ties to the even code."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.sign(x) * torch.round(size / step) * step


def fp8_tiles(weight: Tensor) -> Tensor:
    """A matrix (..., out, in) as FP8 with one scale per 128 x 128 tile holds it."""
    *_, rows, columns = weight.shape
    x = pad(weight.detach(), (0, -columns % 128, 0, -rows % 128))
    x = x.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))  # ..., out / 128, 128, in / 128, 128
    largest = x.abs().amax((-3, -1), keepdim=True).clamp(min=1e-12)
    scale = power_of_two_at_least(largest / FP8_MAX)
    rounded = (e4m3(x / scale) * scale).flatten(-4, -3).flatten(-2, -1)
    return straight_through(weight, rounded[..., :rows, :columns])


def fp4_groups(weight: Tensor) -> Tensor:
    """A matrix (..., out, in) as FP4 with one scale per 32 inputs holds it."""
    return _grouped(weight, 32, FP4_MAX, 1e-12, e2m1)


def kv_rounding(rows: Tensor, rope: int) -> Tensor:
    """KV rows (..., c): FP8 in groups of 64 channels, the rotary channels as they are."""
    rounded = _grouped(rows[..., :-rope].float(), 64, FP8_MAX, 1e-4, e4m3)
    return torch.cat([rounded.to(rows.dtype), rows[..., -rope:]], -1)


def index_rounding(rows: Tensor, hadamard: Tensor) -> Tensor:
    """The indexer's queries or rows (..., width): Hadamard, then FP4 in groups of 32."""
    turned = rows.float() @ hadamard
    return _grouped(turned, 32, FP4_MAX, FP4_MAX * 2.0**-126, e2m1).to(rows.dtype)


def hadamard_matrix(width: int) -> Tensor:
    """Orthonormal, Sylvester order, (width, width)."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * width**-0.5


def _grouped(x: Tensor, group: int, largest: float, floor: float, nearest: Nearest) -> Tensor:
    groups = x.detach().unflatten(-1, (-1, group))
    scale = power_of_two_at_least(groups.abs().amax(-1, keepdim=True).clamp(min=floor) / largest)
    return straight_through(x, (nearest(groups / scale) * scale).flatten(-2))
