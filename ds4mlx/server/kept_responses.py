"""Responses that clients may ask for again, or go on from; in bounded memory, the oldest leave."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from ds4mlx.server.schemas_openai import Object
from ds4mlx.server.sse import to_json


@dataclass(frozen=True)
class Kept:
    """A response, and the items of its whole conversation: those before it and its own input.

    size: characters of all that, which is no less than what leaves memory with it.
    """

    response: Object
    before: Sequence[Object]
    size: int

    @property
    def items(self) -> list[Object]:
        """What a response that goes on from this one stands on."""
        return [*self.before, *self.response["output"]]


class KeptResponses:
    """Responses by their ids. most: how many; characters: of all of them together."""

    def __init__(self, most: int = 1000, characters: int = 256 << 20):
        self.most, self.characters = most, characters
        self.size = 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._items: dict[str, Object] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, response: Object, own: Sequence[Object], previous: Kept | None) -> None:
        """Keep a response to its own items; one that is larger than all room is not kept."""
        size = len(to_json(response)) + len(to_json(own)) + (previous.size if previous else 0)
        if size > self.characters:
            return
        before = (*(previous.items if previous else ()), *own)
        self._kept[response["id"]] = Kept(response, before, size)
        self._items |= {item["id"]: item for item in response["output"]}
        self.size += size
        while len(self._kept) > self.most or self.size > self.characters:
            self.remove(next(iter(self._kept)))

    def get(self, response_id: str) -> Kept | None:
        """The response, which was asked for now and so leaves last."""
        if response_id in self._kept:
            self._kept.move_to_end(response_id)
        return self._kept.get(response_id)

    def item(self, item_id: str) -> Object | None:
        """An item of the output of a response that is kept."""
        return self._items.get(item_id)

    def remove(self, response_id: str) -> bool:
        """Forget a response; whether it was there."""
        kept = self._kept.pop(response_id, None)
        if kept is None:
            return False
        self.size -= kept.size
        for item in kept.response["output"]:
            self._items.pop(item["id"], None)
        return True
