"""What a source of weights offers, and which kind of source a location is."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ds4mlx.config import ModelConfig
from ds4mlx.convert.downloads import Downloads
from ds4mlx.convert.gguf_source import GGUFSource
from ds4mlx.convert.official import OfficialSource
from ds4mlx.errors import DataError
from ds4mlx.weights.inventory import Entry


class Source(Protocol):
    """Weights by entry of the inventory; everything headers can tell is checked when it is opened."""

    name: str
    path: Path
    config: ModelConfig
    config_values: dict[str, Any]
    inventory: dict[str, list[Entry]]
    downloads: Downloads | None  # what fetches the weights of a hub repository

    def dtype(self, entry: Entry) -> str:
        """Type that the source stores an entry in."""
        ...

    def exact(self, entry: Entry) -> str:
        """The format that holds an entry's values exactly."""
        ...

    def stored(self, entry: Entry, expert: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows (of one expert if it is a stack) as planes of the exact format."""
        ...

    def values(self, entry: Entry, expert: int, start: int, stop: int) -> np.ndarray:
        """Rows decoded exactly: float32, or int32 ids."""
        ...

    def origin(self, entry: Entry) -> tuple[str, list[str]]:
        """The source's name of an entry, and the files that hold it."""
        ...

    def nbytes(self, entry: Entry) -> int:
        """Bytes of an entry in the source."""
        ...

    def remote(self, entry: Entry) -> set[str]:
        """The files that hold an entry, and are still to be downloaded."""
        ...

    def small_files(self) -> dict[str, bytes]:
        """Tokenizer files to put beside the weights."""
        ...

    def fingerprint(self) -> str:
        """Digest of everything headers tell."""
        ...


def open_source(location: str | Path, mtp: str | Path | None = None) -> Source:
    """A local official directory, a hub repo id, or a GGUF file (any of its shards).

    mtp: a GGUF file with the MTP block of a GGUF source. Raises DataError.
    """
    path = Path(location).expanduser()
    if path.is_file():
        return GGUFSource(path, None if mtp is None else Path(mtp).expanduser())
    if mtp is not None:
        raise DataError(f"{mtp}: an official checkpoint brings its own MTP block")
    return OfficialSource(location)
