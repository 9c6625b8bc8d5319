"""The replay map as several threads read it, in the store's directory or in memory alone."""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from ds4mlx.store.calls import MOST, Calls


class Replay(Mapping[str, str]):
    """Text by the id of a call in it. path: the store's file; None keeps the texts in memory."""

    def __init__(self, path: Path | None):
        self._lock = threading.Lock()
        self._calls = None if path is None else Calls(path)
        self._texts: dict[str, str] = {}

    def remember(self, ids: list[str], text: str) -> None:
        """Note the text of the calls with these ids; durably, where there is a file.

        Raises OSError.
        """
        with self._lock:
            if self._calls is not None:
                self._calls.remember(ids, text)
                return
            self._texts |= dict.fromkeys(ids, text)
            for old in list(self._texts)[:-MOST]:
                del self._texts[old]

    def __getitem__(self, call: str) -> str:
        with self._lock:
            return (self._texts if self._calls is None else self._calls)[call]

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._texts if self._calls is None else self._calls))

    def __len__(self) -> int:
        return sum(1 for _ in self)
