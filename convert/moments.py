"""Second moments of what the routed experts are given: what files of them hold, and their checks.

A file is in the safetensors form. For every main layer N it has `layers.N.w1` (D, D), the sum of
x x^T over all tokens, where x is the normed input of the experts' gate and up; `layers.N.counts` (E,),
the tokens that met each expert; `layers.N.ffn_norm` (D,), which tells models apart; and, if they were
collected, `layers.N.w2` (E, F, F), each expert's own sums for down. All are float32. Its metadata
have the number of tokens and a checksum of every tensor.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from ds4mlx.config import ModelConfig
from ds4mlx.convert.feedback import Moment
from ds4mlx.convert.sources import Source
from ds4mlx.errors import DataError
from ds4mlx.weights import tensor_file
from ds4mlx.weights.inventory import Entry
from ds4mlx.weights.tensor_file import TensorFile

KIND = "ds4mlx moments 1"
# Tokens a column that a layer's matrix needs, and that an expert's own needs to help more than harm.
LEAST, ENOUGH = 4, 16
# How much larger rounded sums may be than exact ones, and how much a sum of squares may lack: each of
# 100 million tokens what is below float32's smallest normal number.
ROUNDED, LOST = np.float32(1.01), np.float32(1e-30)


class Moments:
    """A file of second moments that has been checked. Raises DataError naming it."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        self.file = TensorFile(path)
        about = self.file.metadata
        if about.get("kind") != KIND:
            raise DataError(f"{path}: is no file of second moments")
        self.fingerprint = hashlib.sha256(self.file.header).hexdigest()
        try:
            self.tokens, self._checksums = int(about["tokens"]), json.loads(about["checksums"])
        except (KeyError, ValueError) as error:
            raise DataError(f"{path}: its metadata are damaged") from error
        self._layer: tuple[str, Moment] | None = None  # the last that was asked for

    def check(self, source: Source) -> None:
        """DataError if any of it is damaged, too little, or of another model than the source's."""
        shapes = tensor_shapes(source.config, self.per_expert)
        for name, shape in shapes.items():
            found = self.file.info(name)
            if (found.dtype, found.shape) != ("F32", shape):
                raise DataError(
                    f"{self.path}: {name} is {found.dtype} {list(found.shape)}, and the model needs "
                    f"F32 {list(shape)}: these are moments of another model"
                )
        needed = LEAST * source.config.hidden_size
        if self.tokens < needed:
            raise DataError(
                f"{self.path}: moments of {self.tokens:,} tokens are too few for "
                f"{source.config.hidden_size:,} columns: collect at least {needed:,}"
            )
        for name in shapes:
            self._check_values(name)
        self._check_model(source)

    def _check_values(self, name: str) -> None:
        """Matrix by matrix, so that no more is held."""
        running, info = xxhash.xxh3_128(), self.file.info(name)
        step = 4 * math.prod(info.shape[-2:])
        for first in range(0, info.nbytes, step):
            raw = self.file.read(name, first, step)
            running.update(raw)
            values = np.frombuffer(raw, np.float32)
            if not np.isfinite(values).all():
                raise DataError(f"{self.path}: {name} has values that are not finite")
            if name.endswith(".counts") and (values < 0).any():
                raise DataError(f"{self.path}: {name} has numbers of tokens below 0")
            none = name.endswith(".w1") and not values.any()
            square = name.endswith((".w1", ".w2"))
            if none or (square and not _sums(values.reshape(info.shape[-2:]))):
                raise DataError(f"{self.path}: {name} is no matrix of second moments")
        if running.hexdigest() != self._checksums.get(name):
            raise DataError(f"{self.path}: {name} is damaged: it does not match its checksum")

    def _check_model(self, source: Source) -> None:
        """Compares the norms before the experts, but for those that are still to be downloaded."""
        for entry in (e for entries in source.inventory.values() for e in entries):
            layer = re.fullmatch(r"layers\.(\d+)\.ffn_norm\.weight", entry.name)
            if layer is None or source.remote(entry):
                continue
            values = source.values(entry, 0, 0, entry.shape[0])
            if not np.array_equal(values, self._array(f"layers.{layer[1]}.ffn_norm")):
                raise DataError(f"{self.path}: these are moments of another model")

    @property
    def per_expert(self) -> bool:
        """Whether it has each expert's own moments for down."""
        return "layers.0.w2" in self.file.tensors

    def of(self, entry: Entry, expert: int) -> Moment | None:
        """Moments for one expert of a stack; None where there are none, or of too few tokens."""
        found = re.fullmatch(r"(layers\.\d+)\.ffn\.experts\.(w[123])\.weight", entry.name)
        if found is None:
            return None
        if found[2] == "w2":
            return self._down(found[1], expert, entry.shape[-1])
        if self._layer is None or self._layer[0] != found[1]:
            self._layer = found[1], self._moment(f"{found[1]}.w1", self._array(f"{found[1]}.w1"))
        return self._layer[1]

    def _down(self, layer: str, expert: int, columns: int) -> Moment | None:
        if not self.per_expert or self._array(f"{layer}.counts")[expert] < ENOUGH * columns:
            return None
        nbytes = 4 * columns * columns
        raw = self.file.read(f"{layer}.w2", expert * nbytes, nbytes)
        sums = np.frombuffer(raw, np.float32).reshape(columns, columns)
        return self._moment(f"{layer}.w2", sums)

    def _moment(self, name: str, sums: np.ndarray) -> Moment:
        try:
            return Moment.of(sums)
        except np.linalg.LinAlgError:
            raise DataError(f"{self.path}: {name} is no matrix of second moments") from None

    def _array(self, name: str) -> np.ndarray:
        info = self.file.info(name)
        values = np.frombuffer(self.file.read(name, 0, info.nbytes), np.float32)
        return values.reshape(info.shape)

    def summary(self, config: ModelConfig) -> str:
        """Which matrices are rounded with moments."""
        text = f"gate and up: second moments of {self.tokens:,} tokens in every layer"
        if not self.per_expert:
            return f"{text}\ndown: no second moments, importances only"
        needed, layers = ENOUGH * config.moe_intermediate_size, range(config.num_hidden_layers)
        enough = sum(int((self._array(f"layers.{i}.counts") >= needed).sum()) for i in layers)
        return (
            f"{text}\ndown: second moments for the {enough:,} of "
            f"{len(layers) * config.n_routed_experts:,} experts that met {needed:,} tokens or more"
        )


def _sums(values: np.ndarray) -> bool:
    """Whether they can be sums of x x^T: no two columns go together more than each with itself."""
    energy = values.diagonal()
    if not (energy >= 0).all():
        return False
    size = np.sqrt(energy + LOST)
    return bool((np.abs(values) <= np.multiply.outer(size * ROUNDED, size)).all())


def tensor_shapes(config: ModelConfig, per_expert: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of a file, in their order."""
    width, inner, experts = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_hidden_layers):
        shapes[f"layers.{layer}.w1"] = width, width
        shapes[f"layers.{layer}.counts"] = (experts,)
        shapes[f"layers.{layer}.ffn_norm"] = (width,)
        if per_expert:
            shapes[f"layers.{layer}.w2"] = experts, inner, inner
    return shapes


def write_moments(path: Path, arrays: Mapping[str, np.ndarray], tokens: int, run: str) -> None:
    """Write float32 arrays by name. run: see `run_of`. Equal arguments give equal bytes."""
    checksums = {name: xxhash.xxh3_128_hexdigest(array.data) for name, array in arrays.items()}
    about = {"kind": KIND, "tokens": str(tokens), "run": run, "checksums": json.dumps(checksums)}
    listed = {name: ("F32", array.shape) for name, array in arrays.items()}
    with path.open("wb") as file:
        file.write(tensor_file.header(listed, about))
        for array in arrays.values():
            file.write(array.data)


def run_of(path: Path) -> str | None:
    """The `run` a file was written with; None for any other file."""
    try:
        return TensorFile(path).metadata.get("run")
    except DataError:
        return None
