"""Where kernels are used: what operations ask before they launch one.

A kernel takes over where MLX computes on a GPU, the activations are bfloat16 or float32, the sizes suit
it, and it was good when it was compared with the plain operations on this machine (`self_check`);
everywhere else those do. $DS4MLX_KERNELS=0 asks for the plain operations everywhere, and 1 for kernels
on every GPU, unseen. Each operation chooses for itself, in the file that holds its kernel and its plain
body.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import mlx.core as mx

from ds4mlx.custom_kernels import dialect, self_check
from ds4mlx.errors import DataError

# Up to this many tokens each reads its own experts; with more, tokens are sorted by expert.
FEW = 8
# The experts of a token are kept a lane of a SIMD-group each.
MOST_CHOSEN = 32
# Kernels number the elements of activations in 32 bits, and NVIDIA's grids are so long beyond x.
MOST_ELEMENTS, MOST_GROUPS = 1 << 32, 65535

# What $DS4MLX_KERNELS may be; without it verdicts decide.
SETTINGS = {"": None, "0": False, "1": True}

_wanted: ContextVar[bool | None] = ContextVar("kernels", default=None)
_training: ContextVar[bool] = ContextVar("training", default=False)
_asked: ContextVar[set[self_check.Asked] | None] = ContextVar("asked", default=None)
_eight: ContextVar[bool] = ContextVar("eight_bit_activations", default=False)


@contextlib.contextmanager
def kernels(used: bool = True) -> Iterator[None]:
    """Inside the block kernels are used wherever there is a GPU, whatever their verdicts, or nowhere."""
    before = _wanted.set(used)
    try:
        yield
    finally:
        _wanted.reset(before)


def plain_operations() -> contextlib.AbstractContextManager[None]:
    """Inside the block no kernel is used: for comparisons."""
    return kernels(False)


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Inside the block only kernels that decode weights are used: no other is ever differentiated."""
    before = _training.set(True)
    try:
        yield
    finally:
        _training.reset(before)


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


@contextlib.contextmanager
def asking() -> Iterator[set[self_check.Asked]]:
    """Gives the kernels, and types of activations, that are asked about inside the block."""
    before = _asked.get()
    asked: set[self_check.Asked] = set()
    _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.set(before)
        if before is not None:
            before |= asked


def decided() -> bool | None:
    """Whether kernels are used, if that does not depend on verdicts; None if it does.

    Raises DataError for a $DS4MLX_KERNELS that says neither, where that is what decides.
    """
    if dialect.target() is None:
        return False
    wanted = _wanted.get()
    if wanted is not None:
        return wanted
    said = os.environ.get("DS4MLX_KERNELS", "")
    if said not in SETTINGS:
        raise DataError(f"$DS4MLX_KERNELS must be 0, 1 or empty, not {said!r}")
    return SETTINGS[said]


def in_use() -> bool:
    """Whether kernels are asked for and the device can run them, those that are good there."""
    return decided() is not False


def ways() -> list[int]:
    """What decides, beside shapes and verdicts, which launches a traced function makes."""
    return [int(eight_bits()), {True: 1, False: 0, None: 2}[decided()]]


def active(x: mx.array, *kernels: str, dtype: mx.Dtype | None = None) -> bool:
    """Whether the kernels may take activations x.

    kernels: the names of all that the operation launches; one that begins others' names, up to a "_",
    stands for them too. They are compared with their references first, if they never were here. dtype:
    the type that the kernels round to, where x, such as the sums of a product, is of another.
    """
    if x.dtype not in (mx.bfloat16, mx.float32) or x.size == 0:
        return False
    if _training.get() and not all(kernel.startswith("decode_") for kernel in kernels):
        return False
    asked, dtype = _asked.get(), dtype or x.dtype
    if asked is not None:
        asked.update((kernel, dtype) for kernel in kernels)
    settled, where = decided(), dialect.target()
    if settled is not None or where is None:
        return settled is True
    return self_check.good(where, kernels, dtype)


def made_up(count: int) -> int:
    """The least power of two that is not below a number of tokens, for which a text is compiled.

    A server's sequences come and go, and compiling for every number of them would keep all waiting.
    """
    return 1 << (count - 1).bit_length()


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
