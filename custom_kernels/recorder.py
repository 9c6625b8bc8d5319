"""A launcher that launches nothing: it notes every launch and answers with zeros of the right shapes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels import dialect


@dataclass(frozen=True)
class Spec:
    """Shape and type of an array."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Operation:
    """A launch or an operation of MLX's own: what it takes and gives, and the bytes that it moves.

    read: bytes of its inputs, of each no more than is read. threadgroups and threads (of each) are of
    kernels only.
    """

    name: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    read: int
    threadgroups: tuple[int, int, int] | None = None
    threads: int | None = None

    @property
    def written(self) -> int:
        """Bytes of its outputs."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def largest(self) -> int:
        """Bytes of its largest output."""
        return max((output.nbytes for output in self.outputs), default=0)


@dataclass
class Recorder:
    """A launcher that launches nothing."""

    target: dialect.Target
    launches: list[Operation]

    def launch(
        self,
        kernel: dialect.Kernel,
        inputs: list[mx.array],
        outputs: Sequence[dialect.Output],
        groups: tuple[int, int, int],
        threads: int,
        template: list[tuple[str, Any]],
        reads: dialect.Shares | None,
    ) -> list[mx.array]:
        """Note a launch; its outputs are zeros that hang on its inputs."""
        assert len(inputs) == len(kernel.inputs) and len(outputs) == len(kernel.outputs)
        shares: Mapping[str, float] = {} if reads is None else reads()
        assert set(shares) <= set(kernel.inputs), "shares are those of inputs"
        given = zip(kernel.inputs, inputs, strict=True)
        read = sum(x.nbytes * min(1.0, shares.get(name, 1.0)) for name, x in given)
        taken = tuple(Spec(x.shape, x.dtype) for x in inputs)
        made = tuple(Spec(tuple(shape), dtype) for shape, dtype in outputs)
        self.launches.append(Operation(kernel.name, taken, made, round(read), groups, threads))
        return mx.depends([zeros(output) for output in made], inputs)


def zeros(spec: Spec) -> mx.array:
    """An array of zeros that takes the memory of one."""
    return mx.broadcast_to(mx.array(0, spec.dtype), spec.shape)
