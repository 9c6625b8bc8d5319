"""From a model directory, or a hub repository that holds one, to a Model and its tokenizer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.first_use import prepare
from ds4mlx.engine import adapters, room
from ds4mlx.engine.chat_tokenizer import ChatTokenizer
from ds4mlx.engine.default_model import default_model
from ds4mlx.errors import DataError
from ds4mlx.model.linear import Matrix, shapes
from ds4mlx.model.model import Model
from ds4mlx.state.blank import fill_blank
from ds4mlx.state.rounding import Rounding
from ds4mlx.text.tokenizer import Tokenizer
from ds4mlx.weights.adapter import read_adapter
from ds4mlx.weights.directory import GGUF_RECIPE, MANIFEST, ModelDirectory
from ds4mlx.weights.hub import Repository, may_be_repository

Length = Callable[[Tokenizer, ModelConfig], int]


def load(
    path: str | Path | None = None,
    dtype: mx.Dtype = mx.bfloat16,
    rounding: Rounding = "official",
    *,
    context: int | Length | None = None,
    adapter: str | Path | None = None,
    on_file: Callable[[int, int], None] | None = None,
) -> tuple[Model, Tokenizer]:
    """Load a converted model and its tokenizer.

    path: a directory written by `ds4mlx convert`, or the hub repo id of one; without one
        $DS4MLX_MODEL, else the small model that comes with the package.
    dtype: activation type, bfloat16 or (for checks) float32; weights stay as stored.
    rounding: "official" gives KV rows and the indexer the model's own FP8/FP4 values, "none" does
    not round. context: how many tokens the memory has to take, or what says it once the tokenizer is
    there; without it, those of one chunk of a prompt. adapter: a directory with adapters for the
    model, see `load_adapter` in `ds4mlx.research`. on_file: told (files read, files in all) after
    each weight file.
    Raises DataError if the directory is incomplete or does not fit its configuration, and before any
    weight is read if the adapters are not the model's, or if the memory cannot take the model and the
    context: see `engine/room.py`. The first time on a machine, the kernels that the model uses are
    compared with plain operations.
    """
    if rounding not in ("official", "none"):
        raise DataError(f"rounding must be 'official' or 'none', not {rounding!r}")
    if dtype not in (mx.bfloat16, mx.float32):
        raise DataError(f"dtype must be mlx.core.bfloat16 or float32, not {dtype}")
    directory = ModelDirectory.open(default_model() if path is None else locate(path))
    directory.check_small_files()
    tokenizer = ChatTokenizer.from_dir(directory.path)
    tokens = context(tokenizer, directory.config) if callable(context) else context
    room.plan(directory.config, directory, tokens, dtype, rounding).check()
    model = Model(directory.config, dtype, rounding)
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            module.store(directory.formats[name])
    adapted = None if adapter is None else read_adapter(adapter, shapes(model))
    if directory.recipe == GGUF_RECIPE:
        model.settle_ties()
    raise_wired_limit()
    model.load_weights(list(_read_all(directory, on_file).items()))
    if adapted is not None:
        adapters.attach(model, adapted)
    model.identity = directory.manifest["checksum"]
    prepare(partial(_build, model))
    return model, tokenizer


def _build(model: Model) -> None:
    """The graphs of a few tokens, more than are decoded at a time, and of steps of one, two and as many
    sequences as go together: what answers ask for.

    They come after so many tokens that the indexer has to choose among the rows.
    """
    deep = fill_blank(model.make_cache(), 4 * (model.args.index_topk + 2))
    model.last_logits(mx.zeros((1, dispatch.FEW + 1), mx.int32), deep)
    states = [deep, *(model.make_cache() for _ in range(dispatch.FEW - 1))]
    for count in (1, 2, dispatch.FEW):
        model.step(mx.zeros((count,), mx.int32), states[:count])


def locate(path: str | Path) -> Path:
    """The local directory of `path`; a hub repo id is downloaded (or found in the hub's cache).

    The manifest comes first, so that a repository of another kind costs no download.
    """
    if not may_be_repository(path):
        return Path(path)
    other = ": not a converted model; `ds4mlx convert` makes one"
    return Repository(str(path), MANIFEST, other).fetch_all()


def read_weights(file: Path) -> dict[str, mx.array]:
    """The arrays of one weight file, read when first used."""
    try:
        arrays = mx.load(str(file))
    except RuntimeError as error:
        raise DataError(f"{file}: {error}") from None
    assert isinstance(arrays, dict)
    return arrays


def raise_wired_limit() -> None:
    """Let Metal keep as much memory resident as it recommends for this machine; else nothing.

    By default macOS may page out weights between tokens, which for a model near the size of the
    memory makes every token read from the disk. Before macOS 15 the limit has no effect.
    """
    if mx.metal.is_available() and mx.default_device() == mx.gpu:
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


def _read_all(
    directory: ModelDirectory, on_file: Callable[[int, int], None] | None
) -> dict[str, mx.array]:
    """Every weight, in memory; file by file, so that Ctrl-C need not wait for all of them."""
    weights: dict[str, mx.array] = {}
    for done, file in enumerate(directory.files, 1):
        arrays = read_weights(file)
        mx.eval(arrays)
        weights.update(arrays)
        if on_file is not None:
            on_file(done, len(directory.files))
    return weights
