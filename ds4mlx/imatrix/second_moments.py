"""The file of second moments that a collection writes beside its importances, if one is wanted."""

import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ds4mlx.config import ModelConfig
from ds4mlx.convert import moments
from ds4mlx.durable import replacing
from ds4mlx.engine import machine
from ds4mlx.errors import DataError
from ds4mlx.imatrix.running_sums import Place, RunningSums
from ds4mlx.model.model import Model

NEW = ".new"
# Bytes of each expert's own moments that are summed unless told otherwise.
AFFORDABLE = 4 << 30


@dataclass(frozen=True)
class MomentsFile:
    """Where second moments go; nowhere if `path` is None, and then nothing is done."""

    path: Path | None
    config: ModelConfig
    per_expert: bool

    @classmethod
    def wanted(
        cls, path: Path | None, output: Path, config: ModelConfig, per_expert: bool | None
    ) -> "MomentsFile":
        """per_expert: None for where they are small. Raises DataError if both results are one file."""
        if path is not None and path.resolve() == output.resolve():
            raise DataError(f"{path}: importances and second moments need a file each")
        if per_expert is None:
            per_expert = nbytes(config, True) - nbytes(config, False) <= AFFORDABLE
        return cls(path, config, per_expert)

    @property
    def settings(self) -> tuple[str, ...]:
        """What the results depend on."""
        if self.path is None:
            return ()
        return ("moments per expert" if self.per_expert else "moments",)

    @property
    def places(self) -> list[Place]:
        """The stacks whose moments are summed."""
        parts = () if self.path is None else ("w1", "w2") if self.per_expert else ("w1",)
        return [(n, part) for n in range(self.config.num_hidden_layers) for part in parts]

    def finished(self, run: str, overwrite: bool) -> bool:
        """Whether this run has written it. Raises DataError for a file of another run."""
        if self.path is None:
            return True
        if overwrite or not self.path.exists():
            return False
        if moments.run_of(self.path) != run:
            raise DataError(
                f"{self.path}: exists and is of another model, prompts or options; use --overwrite"
            )
        return True

    def check_fits(self) -> None:
        """DataError if the sums do not fit into the memory, once in all and once for a sequence."""
        if self.path is not None:
            needed = 2 * nbytes(self.config, self.per_expert)
            machine.check_fits(f"{self.path}: summing second moments", needed)

    def write(self, sums: RunningSums, model: Model, tokens: int, run: str) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        arrays = {}
        for name in moments.tensor_shapes(self.config, self.per_expert):
            layer, what = int(name.split(".")[1]), name.split(".")[2]
            if what == "ffn_norm":
                arrays[name] = np.array(model.layers[layer].ffn_norm.weight.astype(mx.float32))
            elif what == "counts":
                arrays[name] = sums.counts[layer, "w1"].ravel().astype(np.float32)
            else:
                found = sums.moments[layer, what]
                arrays[name] = found if what == "w2" else found[0]
        with replacing(self.path, self.path.with_name(self.path.name + NEW)) as new:
            moments.write_moments(new, arrays, tokens, run)


def nbytes(config: ModelConfig, per_expert: bool) -> int:
    """Of a file's tensors."""
    shapes = moments.tensor_shapes(config, per_expert).values()
    return sum(4 * math.prod(shape) for shape in shapes)
