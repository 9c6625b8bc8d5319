"""The replay map: a tool call's id -> exactly the text that the model wrote for the calls.

A client sends calls back as JSON, from which the model's own spelling cannot be told. With the map
a history is rendered byte for byte as it was generated, in another process too.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ds4mlx.store.journal import Journal

MOST = 100_000  # calls remembered; the oldest are forgotten


class Calls(Mapping[str, str]):
    """The map; several processes may add to the file."""

    def __init__(self, path: Path):
        self._journal = Journal(path)
        self._texts: dict[str, str] = {}

    def remember(self, ids: list[str], text: str) -> None:
        """Note, durably, the text of the block of calls with these ids. Raises OSError."""
        self._journal.append([{"call": call, "text": text} for call in ids], durable=True)

    def __getitem__(self, call: str) -> str:
        if call not in self._texts:
            self._refresh()
        return self._texts[call]

    def __iter__(self) -> Iterator[str]:
        self._refresh()
        return iter(self._texts)

    def __len__(self) -> int:
        self._refresh()
        return len(self._texts)

    def _refresh(self) -> None:
        news, anew = self._journal.news()
        if anew:
            self._texts = {}
        for entry in news:
            if isinstance(entry.get("call"), str) and isinstance(entry.get("text"), str):
                self._texts.pop(entry["call"], None)
                self._texts[entry["call"]] = entry["text"]
        for call in list(self._texts)[:-MOST]:
            del self._texts[call]
