"""The replay map: a tool call's id -> exactly the text that the model wrote for the calls.

A client sends calls back as JSON, from which the model's own spelling cannot be told. With the map
a history is rendered byte for byte as it was generated, in another process too. Ids are random, so
conversations do not share any; one that was given to two texts all the same names neither.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ds4mlx.store.journal import Journal

MOST = 100_000  # calls remembered; the oldest are forgotten


class Calls(Mapping[str, str]):
    """The map; several processes may add to the file."""

    def __init__(self, path: Path):
        self.path = path
        self._journal = Journal(path)
        self._texts: dict[str, str | None] = {}  # None: of an id with two texts

    def remember(self, ids: list[str], text: str) -> None:
        """Note, durably, the text of the block of calls with these ids. Raises OSError."""
        self._journal.append([{"call": call, "text": text} for call in ids], durable=True)

    def __getitem__(self, call: str) -> str:
        if call not in self._texts:
            self._refresh()
        text = self._texts[call]
        if text is None:
            raise KeyError(call)
        return text

    def __iter__(self) -> Iterator[str]:
        self._refresh()
        return (call for call, text in self._texts.items() if text is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _refresh(self) -> None:
        news, anew = self._journal.news()
        if anew:
            self._texts = {}
        for entry in news:
            if isinstance(entry.get("call"), str) and isinstance(entry.get("text"), str):
                known = self._texts.pop(entry["call"], entry["text"])
                self._texts[entry["call"]] = known if known == entry["text"] else None
        for call in list(self._texts)[:-MOST]:
            del self._texts[call]
