"""The weight files of a hub repository: headers at once, each file when it is first read.

What the hub's cache has already is used from there and stays. Other files go to a folder that is given
up when the work is done, or to the cache if they are to be kept.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ds4mlx.errors import DataError
from ds4mlx.weights.hub import Repository
from ds4mlx.weights.tensor_file import TensorFile, header_bytes

# Headers that are asked for at a time.
AT_ONCE = 8


class Downloads:
    """The weight files of one repository, and where they are. Raises DataError naming it and the file."""

    def __init__(self, repository: Repository):
        self.repository = repository
        self.folder: Path | None = None  # where files are downloaded to; None: the hub's cache
        self.remote: dict[str, RemoteFile] = {}  # those that are not in the cache

    def open(self, names: list[str]) -> dict[str, TensorFile]:
        """Files by name, their headers read and checked; no weights are downloaded."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            files = dict(zip(names, pool.map(self._open, names), strict=True))
        self.remote = {name: file for name, file in files.items() if isinstance(file, RemoteFile)}
        return files

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that is not in the hub's cache."""
        return {name: file.size for name, file in self.remote.items()}

    def use(self, folder: Path) -> None:
        """Download to this folder from now on; what an earlier run left there half is deleted."""
        self.folder = folder
        for half in folder.rglob("*.incomplete"):
            half.unlink()

    def there(self) -> set[str]:
        """The files that are in the folder."""
        folder = self.folder
        return set() if folder is None else {n for n in self.remote if (folder / n).is_file()}

    def drop(self, names: Iterable[str]) -> None:
        """Delete downloaded files from the folder; in the hub's cache they stay."""
        for name in names:
            self.remote[name].close()
            if self.folder is not None:
                (self.folder / name).unlink(missing_ok=True)

    def _open(self, name: str) -> TensorFile:
        cached = self.repository.cached(name)
        return TensorFile(cached) if cached else RemoteFile(self, name)


class RemoteFile(TensorFile):
    """A weight file on the hub, which is downloaded when its tensors are first read."""

    def __init__(self, downloads: Downloads, name: str):
        self.downloads, self.name = downloads, name
        super().__init__(Path(downloads.repository.name) / name)

    def look(self) -> tuple[int, bytes]:
        """The file's size, and its first bytes up to the end of the header, from the hub."""
        repository = self.downloads.repository
        prefix, size = repository.read(self.name, 0, 8)
        parts = iter((prefix,))

        def read(nbytes: int) -> bytes:
            part = next(parts, None)
            return (
                repository.read(self.name, 8, nbytes)[0] if part is None and nbytes else part or b""
            )

        return size, header_bytes(read, self.path, size)

    def read(self, name: str, first: int, nbytes: int) -> bytes:
        """`nbytes` bytes of a tensor from its byte `first` on; downloads the file if it is not there."""
        if self._fd is None:
            self.path = self._fetch()
        return super().read(name, first, nbytes)

    def _fetch(self) -> Path:
        """Download the file; anew, if a crash of the system left it there without its bytes."""
        repository, folder = self.downloads.repository, self.downloads.folder
        path = repository.fetch(self.name, folder)
        if folder is not None and not self._is(path):
            path.unlink()
            path = repository.fetch(self.name, folder)
        if not self._is(path):
            raise DataError(f"{path}: is not the file that {repository.name} has")
        return path

    def _is(self, path: Path) -> bool:
        try:
            return TensorFile(path).header == self.header
        except DataError:
            return False
