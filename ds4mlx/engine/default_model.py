"""The embedded model: a small official-format checkpoint in the package, converted once a user."""

import hashlib
import os
from pathlib import Path

from ds4mlx.convert import convert
from ds4mlx.durable import lock
from ds4mlx.errors import DataError
from ds4mlx.user_files import cache_directory
from ds4mlx.weights.directory import FORMAT_VERSION, MANIFEST, ModelDirectory

EMBEDDED = Path(__file__).parents[1] / "embedded"
ABOUT = (
    "no model is named (-m or $DS4MLX_MODEL), so this is ds4-tiny, which comes with ds4mlx to try "
    "it out: 16 million parameters that write short Python functions and know nothing else; what "
    "it says is no sample of DeepSeek-V4-Flash"
)


def default_model() -> Path:
    """`$DS4MLX_MODEL`, else the embedded model's directory, converted now if it is not there.

    Processes that come at the same time wait for the first. Raises DataError saying what to do
    where it cannot be written or what is there is damaged.
    """
    named = os.environ.get("DS4MLX_MODEL")
    if named:
        return Path(named)
    path = embedded_directory()
    try:
        if not (path / MANIFEST).exists():
            _convert_once(path)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: {error.strerror}, so the small model cannot be put there; "
            "name a model with -m, or another place with $XDG_CACHE_HOME"
        ) from None
    try:
        ModelDirectory.open(path)
    except DataError as error:
        raise DataError(f"{error}; delete {path} to have the small model made again") from None
    return path


def _convert_once(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        lock(file.fileno())
        convert(EMBEDDED, path, progress=False)


def embedded_directory() -> Path:
    """Where the converted embedded model is, or will be."""
    return cache_directory() / f"embedded-{fingerprint()}"


def fingerprint() -> str:
    """Digest of the embedded files and of the directory format."""
    digest = hashlib.sha256(str(FORMAT_VERSION).encode())
    for file in sorted(EMBEDDED.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
