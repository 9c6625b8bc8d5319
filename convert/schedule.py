"""In which order weight files are written, so that few downloads are on the disk at a time."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Written(Protocol):
    """A weight file to write."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


File = TypeVar("File", bound=Written)


@dataclass(frozen=True)
class Step(Generic[File]):
    """A weight file to write, and the downloads that nothing after it needs."""

    file: File
    done_with: set[str]


class Schedule(Generic[File]):
    """The steps, and what is on the disk at the peak: `peak` bytes, or apart `written`, `downloaded`."""

    def __init__(
        self,
        files: Iterable[File],
        needs: dict[str, set[str]],
        sizes: dict[str, int],
        there: set[str],
        keep: bool,
    ):
        """needs: the downloads of every file by its name; sizes: their bytes; there: those on the disk.

        Of the files that need a download on the disk the next is the one that needs the fewest new
        bytes; where there is none, the first. With `keep` downloads stay.
        """
        self.steps: list[Step[File]] = []
        self.peak = self.written = 0
        left, on_disk, ever = list(files), set(there), set(there)
        while left:
            new = [_new_bytes(needs[file.name], on_disk, sizes) for file in left]
            file = left.pop(new.index(min(new)))
            on_disk |= needs[file.name]
            ever |= on_disk
            self.written += file.nbytes
            self.peak = max(self.peak, self.written + sum(sizes[n] for n in on_disk))
            later = set().union(*(needs[file.name] for file in left))
            self.steps.append(Step(file, set() if keep else on_disk - later))
            on_disk -= self.steps[-1].done_with
        self.downloaded = sum(sizes[n] for n in ever)


def _new_bytes(needs: set[str], on_disk: set[str], sizes: dict[str, int]) -> float:
    """Bytes to download for a file; infinite if nothing of what it needs is on the disk."""
    new = sum(sizes[name] for name in needs - on_disk)
    return new if not new or needs & on_disk else float("inf")
