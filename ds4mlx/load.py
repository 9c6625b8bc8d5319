"""From a model directory, or a hub repository that holds one, to a Model and its tokenizer."""

from pathlib import Path

import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ds4mlx.directory import ModelDirectory
from ds4mlx.errors import DataError
from ds4mlx.linear import Matrix
from ds4mlx.model import Model
from ds4mlx.rounding import Rounding
from ds4mlx.tokenizer import Tokenizer


def load(
    path: str | Path, dtype: mx.Dtype = mx.bfloat16, rounding: Rounding = "official"
) -> tuple[Model, Tokenizer]:
    """Load a converted model and its tokenizer.

    path: a directory written by `ds4mlx convert`, or the hub repo id of one.
    dtype: activation type, bfloat16 or (for checks) float32; weights stay as stored.
    rounding: "official" gives KV rows and the indexer the model's own FP8/FP4 values, "none" does
    not round.
    Raises DataError if the directory is incomplete or does not fit its configuration.
    """
    if rounding not in ("official", "none"):
        raise DataError(f"rounding must be 'official' or 'none', not {rounding!r}")
    directory = ModelDirectory.open(locate(path))
    model = Model(directory.config, dtype, rounding)
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            module.store(directory.formats[name])
    weights: dict[str, mx.array] = {}
    for file in directory.files:
        weights.update(read_weights(file))
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    model.eval()
    return model, Tokenizer.from_dir(directory.path)


def locate(path: str | Path) -> Path:
    """The local directory of `path`; a hub repo id is downloaded (or found in the hub's cache)."""
    if Path(path).exists() or str(path).count("/") != 1 or str(path).startswith((".", "~", "/")):
        return Path(path)
    try:
        return Path(snapshot_download(str(path)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: no such directory, and not found on the hub: {cause}") from None


def read_weights(file: Path) -> dict[str, mx.array]:
    """The arrays of one weight file, read when first used."""
    try:
        arrays = mx.load(str(file))
    except RuntimeError as error:
        raise DataError(f"{file}: {error}") from None
    assert isinstance(arrays, dict)
    return arrays
