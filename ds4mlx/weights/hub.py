"""Repositories of the Hugging Face hub: which names are one, what is in them, and why one cannot be had.

A repository is looked at in one commit, the newest when it is first asked; without a connection, the
one that the hub's cache has. Importing the hub's library takes half a second, which a local directory
need not wait for, so it is done inside functions.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ds4mlx.errors import DataError

# Seconds after which the hub counts as out of reach.
PATIENCE = 5.0


class HubError(DataError):
    """A repository or a file of it cannot be had, now or at all; says which, and the cause."""


def may_be_repository(location: str | Path) -> bool:
    """Whether a location is no local path, and is spelt like a repository: `owner/name`."""
    text = str(location)
    return (
        text.count("/") == 1
        and not text.startswith((".", "~", "/"))
        and not Path(location).expanduser().exists()
    )


class Repository:
    """One commit of a hub repository. Every method raises HubError naming the repository and the cause."""

    def __init__(self, name: str, first: str, without: str = ""):
        """name: `owner/name`. first: the file that tells its kind, which is fetched at once.

        without: what the error says of a repository that lacks this file.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        self.name, self.out_of_reach = name, ""  # or why only the hub's cache can be read
        try:
            _knock(name, first)
            there = Path(hf_hub_download(name, first, etag_timeout=PATIENCE))
        except RemoteEntryNotFoundError:
            raise HubError(f"{name}: the hub repository holds no {first}{without}") from None
        except _failures() as error:
            self.out_of_reach = _cause(error)
            there = _newest_cached(name, first, self.out_of_reach)
        self.path = there.parent  # where the hub's cache has the files of this commit
        self.commit = self.path.name

    def cached(self, file: str) -> Path | None:
        """Where the hub's cache has a file; None if it has it not."""
        path = self.path / file
        return path if path.is_file() else None

    def fetch(self, file: str, folder: Path | None = None) -> Path:
        """Download a file into a folder, or the hub's cache, unless it is there; where it is then."""
        from huggingface_hub import hf_hub_download

        with self._naming(file):
            return Path(
                hf_hub_download(
                    self.name,
                    file,
                    revision=self.commit,
                    local_dir=folder,
                    etag_timeout=PATIENCE,
                )
            )

    def fetch_if_any(self, file: str) -> None:
        """Download a small file into the hub's cache, if the repository has one of that name."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        if self.cached(file) is None and not self.out_of_reach:
            with self._naming(file), contextlib.suppress(RemoteEntryNotFoundError):
                hf_hub_download(self.name, file, revision=self.commit, etag_timeout=PATIENCE)

    def fetch_all(self) -> Path:
        """Download every file into the hub's cache; their directory."""
        from huggingface_hub import snapshot_download

        if self.out_of_reach:
            return self.path
        with self._naming("some file"):
            return Path(snapshot_download(self.name, revision=self.commit))

    def read(self, file: str, start: int, nbytes: int) -> tuple[bytes, int]:
        """Some bytes of a file, downloaded alone, and the size of the whole file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.name, file, revision=self.commit)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={start}-{start + nbytes - 1}"
        with (
            self._naming(file),
            http_stream_backoff("GET", url, headers=headers, timeout=2 * PATIENCE) as response,
        ):
            hf_raise_for_status(response)
            ranged = response.status_code == 206
            skip, data = 0 if ranged else start, b""
            for chunk in response.iter_raw():
                data += chunk
                if len(data) >= skip + nbytes:
                    break
            size = response.headers.get("Content-Range" if ranged else "Content-Length", "")
            return data[skip : skip + nbytes], int(size.rpartition("/")[2])

    @contextlib.contextmanager
    def _naming(self, file: str) -> Iterator[None]:
        from huggingface_hub.errors import RemoteEntryNotFoundError

        what = f"{self.name}: {file} cannot be had from the hub"
        if self.out_of_reach:
            raise HubError(f"{what}: {self.out_of_reach}")
        try:
            yield
        except RemoteEntryNotFoundError:
            raise HubError(f"{self.name}: the hub repository holds no {file}") from None
        except (*_failures(), ValueError, RuntimeError) as error:
            raise HubError(f"{what}: {_cause(error)}") from None


def _knock(name: str, file: str) -> None:
    """Ask for a file once: the library's own download would try for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(name, file), timeout=PATIENCE)


def _newest_cached(name: str, file: str, cause: str) -> Path:
    """The file in the newest commit that the hub's cache has."""
    from huggingface_hub import try_to_load_from_cache

    try:
        there = try_to_load_from_cache(name, file)
    except ValueError:  # no name of a repository
        there = None
    if not isinstance(there, str):
        raise HubError(f"{name}: no such directory, and not found on the hub: {cause}")
    return Path(there)


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's library raises: for answers, names, the disk, and the connection."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The base of HfHubHTTPError in the library for HTTP, which changed its name between versions.
    connection = next(kind for kind in HfHubHTTPError.__bases__ if kind is not OSError)
    return HFValidationError, OSError, connection


def _cause(error: BaseException) -> str:
    """A failure in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _cause(error.__cause__)
    if isinstance(error, GatedRepoError):
        return "it is gated: ask for access on its page, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private (`hf auth login`)"
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE)"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
