"""The sums of an unfinished collection of importances, in memory and on the disk."""

import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from ds4mlx.config import ModelConfig
from ds4mlx.convert.importance import COUNTS, SUMS, imatrix_name
from ds4mlx.durable import replacing
from ds4mlx.errors import DataError

Place = tuple[int, str]  # layer, and "w1" or "w2"


class RunningSums:
    """Squares, float64 (experts, columns), and tokens, float64 (experts, 1), of every stack.

    float64, as a long run adds little to much; `moments`, sums of x x^T that are wanted as well, are
    float32 for their size: (1, D, D) for a layer's w1, (experts, F, F) for its w2. `done`: sequences
    they cover. `run`: fingerprint of what is collected.
    """

    def __init__(self, config: ModelConfig, run: str, moments: Iterable[Place] = ()):
        self.run, self.done = run, 0
        sides = {"w1": config.hidden_size, "w2": config.moe_intermediate_size}
        self.moments = {
            (layer, part): np.zeros(
                (config.n_routed_experts if part == "w2" else 1, sides[part], sides[part]),
                np.float32,
            )
            for layer, part in moments
        }
        self.squares: dict[Place, np.ndarray] = {}
        self.counts: dict[Place, np.ndarray] = {}
        experts = config.n_routed_experts
        for layer in range(config.num_hidden_layers):
            for part, columns in sides.items():
                self.squares[layer, part] = np.zeros((experts, columns))
                self.counts[layer, part] = np.zeros((experts, 1))

    def add(
        self,
        taken: Mapping[Place, tuple[np.ndarray, np.ndarray]],
        moments: Iterable[tuple[Place, np.ndarray]] = (),
    ) -> None:
        """Add a sequence. Raises DataError, before it counts, if its activations are not finite."""
        for (layer, part), (squares, _) in taken.items():
            if not np.isfinite(squares).all():
                raise DataError(
                    f"sequence {self.done + 1}: the inputs of layer {layer}'s {part} are not finite"
                )
        for place, (squares, counts) in taken.items():
            self.squares[place] += squares
            self.counts[place] += counts
        for place, sums in moments:
            self.moments[place] += sums
        self.done += 1

    def save(self, path: Path, temporary: Path) -> None:
        """Replace the file by these sums, all of them or not at all."""
        arrays = {"run": np.array(self.run), "done": np.array(self.done), **self._named()}
        with replacing(path, temporary), temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def resumed(
        cls,
        path: Path,
        config: ModelConfig,
        run: str,
        overwrite: bool,
        moments: Collection[Place] = (),
    ) -> "RunningSums":
        """What `save` wrote, or zeros where there is nothing.

        What is damaged or of another run is a DataError, or with `overwrite` nothing.
        """
        sums = cls(config, run, moments)
        try:
            if path.exists():
                sums._read(path)
        except DataError:
            if not overwrite:
                raise
            return cls(config, run, moments)
        return sums

    def _read(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as stored:
                run, self.done = str(stored["run"]), int(stored["done"])
                for name, array in self._named().items() if run == self.run else ():
                    array[...] = stored[name]
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, AttributeError) as error:
            raise DataError(f"{path}: damaged; use --overwrite to begin anew") from error
        if run != self.run:
            raise DataError(
                f"{path}: is an unfinished run with another model, prompts or options; finish "
                "that one or use --overwrite"
            )

    def stacks(self) -> dict[str, np.ndarray]:
        """The same by their names in an imatrix file; w3 has the input of w1."""
        stacks = {}
        for layer in sorted({layer for layer, _ in self.squares}):
            for part, source in (("w1", "w1"), ("w2", "w2"), ("w3", "w1")):
                name = imatrix_name(layer, part)
                stacks[name + SUMS] = self.squares[layer, source]
                stacks[name + COUNTS] = self.counts[layer, source]
        return stacks

    def _named(self) -> dict[str, np.ndarray]:
        named = {f"{i}.{part}.squares": array for (i, part), array in self.squares.items()}
        named |= {f"{i}.{part}.counts": array for (i, part), array in self.counts.items()}
        return named | {f"{i}.{part}.moments": array for (i, part), array in self.moments.items()}
