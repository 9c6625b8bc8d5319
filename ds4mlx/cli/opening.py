"""What a command opens by its options: a model, and the KV store beside it.

MLX is imported when something is opened, not before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4mlx.cli.arguments import Dtype, size
from ds4mlx.cli.terminal import note, progress
from ds4mlx.errors import DataError

if TYPE_CHECKING:
    import mlx.core as mx

    from ds4mlx.engine.load import Length
    from ds4mlx.model import model as network
    from ds4mlx.store import KVStore
    from ds4mlx.text.tokenizer import Tokenizer


def kv_place(directory: Path | None) -> Path:
    """The directory of the KV store that a command is about: the usual one if none is named.

    That is made if it is missing, and empty then. Raises DataError where it cannot be.
    """
    if directory is not None:
        return directory
    from ds4mlx.store.directory import make_store
    from ds4mlx.user_files import kv_directory

    usual = kv_directory()
    try:
        make_store(usual)
    except OSError as error:
        raise DataError(f"{usual}: {error.strerror}; name another place with --kv-dir") from None
    return usual


@contextlib.contextmanager
def open_store(
    directory: Path | None,
    usual: bool,
    budget: str,
    keep_text: bool,
    loaded: tuple[network.Model, Tokenizer],
    label: str | None,
) -> Iterator[KVStore | None]:
    """The KV store of a command, if it was asked for one; what is being saved ends first.

    directory: where; or, if it is None, in the usual place if `usual`.
    """
    if directory is None and not usual:
        yield None
        return
    from ds4mlx.store import KVStore

    model, tokenizer = loaded
    with KVStore(
        kv_place(directory),
        size(budget),
        model,
        tokenizer=tokenizer,
        keep_text=keep_text,
        label=model_name(label),
    ) as store:
        yield store


def model_name(named: str | None) -> str:
    """What a model is called for people."""
    path = Path(named or os.environ.get("DS4MLX_MODEL") or "embedded")
    return path.resolve().name if path.name in ("", "..") else path.name


def find_model(named: str | None) -> Path:
    """The directory of the model that a command uses."""
    from ds4mlx.engine.default_model import default_model
    from ds4mlx.engine.load import locate

    return locate(named or default_model())


def announce(named: str | None) -> None:
    """Say which model it is where nobody has named one."""
    if named is None and not os.environ.get("DS4MLX_MODEL"):
        from ds4mlx.engine.default_model import ABOUT

        note(f"note: {ABOUT}")


def open_model(
    named: str | None,
    dtype: Dtype | None = None,
    *,
    context: int | Length | None = None,
    adapter: Path | None = None,
    generates: bool = True,
) -> tuple[network.Model, Tokenizer]:
    """Load a model for the command line: by default in bfloat16, or float32 where MLX has only the CPU.

    context, adapter: see `load`. generates: whether it is to generate, for which MLX submits longer graphs.
    """
    from ds4mlx.custom_kernels import dispatch
    from ds4mlx.engine.load import load
    from ds4mlx.submission import submit_by_number

    if generates and dispatch.in_use():
        submit_by_number()
    told = partial(progress, "loading", "files")
    options: Any = {"context": context, "adapter": adapter, "on_file": told}
    opened = load(find_model(named), activations(dtype), **options)
    announce(named)
    return opened


def activations(dtype: Dtype | None) -> mx.Dtype:
    """The type of activations that was asked for, or the usual one of the device."""
    import mlx.core as mx

    on_cpu = mx.default_device() == mx.cpu  # where bfloat16 is slower and less exact
    usual = mx.float32 if on_cpu else mx.bfloat16
    return {"float32": mx.float32, "bfloat16": mx.bfloat16, None: usual}[dtype]


def context(named: str | None, wanted: int | None, dtype: Dtype | None = None) -> int:
    """How many tokens a server of a model takes: those wanted, else as many as fit here.

    More than the model's own are cut to them, which is said. Raises DataError where they do not fit;
    nothing is loaded.
    """
    from ds4mlx.engine import room
    from ds4mlx.weights.directory import ModelDirectory

    directory = ModelDirectory.open(find_model(named))
    most = directory.config.max_position_embeddings
    asked = None if wanted is None else min(wanted, most)
    if asked != wanted:
        note(f"note: a context of {wanted:,} tokens is cut to the model's own, {most:,}")
    plan = room.plan(directory.config, directory, asked, activations(dtype), saving=True)
    plan.check()
    return plan.largest_context() if asked is None else asked
