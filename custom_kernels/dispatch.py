"""Where kernels are used: what operations ask before they launch one.

A kernel takes over where MLX computes on an NVIDIA GPU, the activations are bfloat16 or float32, and
the sizes suit it; everywhere else the plain operations do, which the kernels are checked against.
$DS4MLX_KERNELS=0 asks for those everywhere, and 1 for kernels on Metal too, where none has run yet.
Each operation chooses for itself, in the file that holds its kernel and its plain body.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import mlx.core as mx

from ds4mlx.custom_kernels import dialect

# Up to this many tokens each reads its own experts; with more, tokens are sorted by expert.
FEW = 8
# The experts of a token are kept a lane of a SIMD-group each.
MOST_CHOSEN = 32
# Kernels number the elements of activations in 32 bits, and NVIDIA's grids are so long beyond x.
MOST_ELEMENTS, MOST_GROUPS = 1 << 32, 65535

_wanted: ContextVar[bool | None] = ContextVar("kernels", default=None)
_eight: ContextVar[bool] = ContextVar("eight_bit_activations", default=False)


@contextlib.contextmanager
def kernels(used: bool = True) -> Iterator[None]:
    """Inside the block kernels are used wherever there is a GPU, or nowhere."""
    before = _wanted.set(used)
    try:
        yield
    finally:
        _wanted.reset(before)


def plain_operations() -> contextlib.AbstractContextManager[None]:
    """Inside the block no kernel is used: for comparisons."""
    return kernels(False)


@contextlib.contextmanager
def eight_bit_activations() -> Iterator[None]:
    """Inside the block decoding rounds what its experts are given to 8 bits, where a format can."""
    before = _eight.set(True)
    try:
        yield
    finally:
        _eight.reset(before)


def eight_bits() -> bool:
    """Whether decoding rounds activations to 8 bits here."""
    return _eight.get()


def in_use() -> bool:
    """Whether kernels are asked for and the device can run them."""
    where, wanted = dialect.target(), _wanted.get()
    if where is None:
        return False
    if wanted is not None:
        return wanted
    setting = os.environ.get("DS4MLX_KERNELS")
    return setting == "1" or (where == "cuda" and setting != "0")


def active(x: mx.array) -> bool:
    """Whether kernels may take activations x."""
    return x.dtype in (mx.bfloat16, mx.float32) and x.size > 0 and in_use()


def most_tokens(elements: int) -> int:
    """Tokens that one launch may take, if each has so many elements in the largest array."""
    return max(1, min(MOST_GROUPS, MOST_ELEMENTS // elements))


def in_pieces(
    compute: Callable[..., mx.array], most: int, *arrays: mx.array, axis: int = 0
) -> mx.array:
    """compute(*arrays), at most `most` tokens at a time; tokens lie along `axis` of all arrays."""
    count = arrays[0].shape[axis]
    if count <= most:
        return compute(*arrays)
    cuts = list(range(most, count, most))
    parts = zip(*(mx.split(a, cuts, axis) for a in arrays), strict=True)
    return mx.concatenate([compute(*part) for part in parts], axis)
