"""The dialect kernels are written in, and how a kernel is launched on Metal or CUDA.

A body is Metal's language without its vector arithmetic: scalars, 16-byte vector loads, half2 through
the few functions of `words`, one-dimensional threadgroups of whole SIMD-groups.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any, Literal, Protocol

import mlx.core as mx

from ds4mlx.custom_kernels.text_files import included
from ds4mlx.custom_kernels.texts import compact, cuda_text, without_unused
from ds4mlx.custom_kernels.words import CUDA, METAL

Target = Literal["metal", "cuda"]
Output = tuple[tuple[int, ...], mx.Dtype]
# The shares of inputs, by name, that a launch reads where it does not read the whole of them.
Shares = Callable[[], Mapping[str, float]]

# What MLX looks for in a body, to hand it over beside the array.
_SHAPES = re.compile(r"\w+_(?:shape|strides|ndim)\b")


def parts(names: Sequence[str], read: int, of: int) -> Shares:
    """Shares for inputs that are stacks of `of` parts, of which a launch reads `read` at most."""
    return lambda: dict.fromkeys(names, min(1.0, read / of))


class Launcher(Protocol):
    """What launches kernels in MLX's place: it notes them, or runs them in another way."""

    target: Target  # for which they are made

    def launch(
        self,
        kernel: "Kernel",
        inputs: list[mx.array],
        outputs: Sequence[Output],
        groups: tuple[int, int, int],
        threads: int,
        template: list[tuple[str, Any]],
        reads: Shares | None,
    ) -> list[mx.array]:
        """The outputs of a launch; see `Kernel.__call__`."""
        ...


_launcher: ContextVar[Launcher | None] = ContextVar("launcher", default=None)


@contextlib.contextmanager
def launching(launcher: Launcher | None) -> Iterator[None]:
    """Inside the block every kernel is launched by `launcher`, on a machine of any kind; None: by MLX."""
    before = _launcher.set(launcher)
    try:
        yield
    finally:
        _launcher.reset(before)


def launcher() -> Launcher | None:
    """What launches kernels in MLX's place here, if anything does."""
    return _launcher.get()


def target() -> Target | None:
    """What kernels are made for here: "metal", "cuda", or None for a CPU."""
    other = _launcher.get()
    if other is not None:
        return other.target
    if mx.default_device() != mx.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


class Kernel:
    """A kernel by name; made for the target when it is first called there.

    `metal` and `cuda` are header texts for one target only, put before the common `header`. `shared`:
    bytes of threadgroup memory, all in one array, where that is more than CUDA lets a text declare.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        body: str,
        header: str = "",
        *,
        metal: str = "",
        cuda: str = "",
        shared: int = 0,
    ):
        self.name, self.inputs, self.outputs, self.body = name, list(inputs), list(outputs), body
        self.shared = shared
        self.header, self.only = header, {"metal": metal, "cuda": cuda}

    def text(self, where: str) -> tuple[str, str]:
        """(header, body) for "metal" or "cuda"."""
        if where == "metal":
            return METAL + self.only["metal"] + self.header, self.body
        header = CUDA + self.only["cuda"] + self.header
        return cuda_text(header), cuda_text(self.body, self.shared > 0)

    @cached_property
    def _made(self) -> dict[str, Callable[..., list[mx.array]]]:
        return {}

    def handed(self, where: str) -> tuple[str, str]:
        """(header, body) as they are handed to MLX."""
        header, body = self.text(where)
        body, header = compact(body), compact(without_unused(header, body))
        if where == "cuda":
            asked = "".join(f"// {name}\n" for name in sorted(set(_SHAPES.findall(body))))
            header, body = included(header), asked + included(body)
        return header, body

    def make(self, where: str) -> Callable[..., list[mx.array]]:
        """MLX's kernel object for a target."""
        made = self._made.get(where)
        if made is None:
            header, body = self.handed(where)
            maker: Any = mx.fast.metal_kernel if where == "metal" else mx.fast.cuda_kernel
            more = {"shared_memory": self.shared} if where == "cuda" else {}
            made = maker(self.name, self.inputs, self.outputs, body, header=header, **more)
            self._made[where] = made
        return made

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[Output],
        *,
        groups: tuple[int, int, int],
        threads: int,
        template: Sequence[tuple[str, Any]],
        reads: Shares | None = None,
    ) -> list[mx.array]:
        """Launch `groups` threadgroups of `threads` threads; outputs are (shape, type).

        reads: asked only by a launcher that notes bytes, outside any trace, so that it may look at
        values.
        """
        launcher = _launcher.get()
        if launcher is not None:
            sizes = groups, threads, list(template)
            return launcher.launch(self, list(inputs), outputs, *sizes, reads)
        where = target()
        assert where is not None, "kernels need a GPU"
        return self.make(where)(
            inputs=list(inputs),
            template=list(template),
            grid=(groups[0] * threads, *groups[1:]),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
