"""Responses that are kept: in how much memory, and what leads back to them."""

import pytest

from ds4mlx.errors import DataError
from ds4mlx.server import responses_request
from ds4mlx.server.kept_responses import KeptResponses
from ds4mlx.server.response_object import listed_items
from ds4mlx.server.schemas_responses import InputTokensRequest


def kept(number, before=(), size=10):
    output = [
        {"type": "message", "id": f"msg_{number}", "role": "assistant", "content": "x" * size}
    ]
    return {"id": f"resp_{number}", "output": output}


def test_responses_are_kept_in_bounded_memory():
    store = KeptResponses(most=3, characters=3000)
    for number in range(5):
        store.add(kept(number), [{"role": "user", "content": str(number)}], None)
    assert len(store) == 3 and store.get("resp_1") is None and store.item("msg_1") is None
    assert store.get("resp_2") and store.item("msg_2")
    store.add(kept(5), [], None)  # 2 was asked for after 3
    assert store.get("resp_3") is None and store.get("resp_2")
    store.add(kept(6, size=2500), [], None)
    assert len(store) < 4 and store.size <= 3000
    store.add(kept(7, size=5000), [], None)
    assert store.get("resp_7") is None and store.get("resp_6")
    assert store.remove("resp_6") and not store.remove("resp_6")
    for number in range(6):
        store.remove(f"resp_{number}")
    assert store.size == 0 and len(store) == 0


def test_a_kept_response_knows_its_whole_conversation():
    store = KeptResponses()
    store.add(kept(1), [{"role": "user", "content": "a"}], None)
    store.add(kept(2), [{"role": "user", "content": "b"}], store.get("resp_1"))
    store.remove("resp_1")
    found = store.get("resp_2")
    assert [item.get("content", "")[:1] for item in found.items] == ["a", "x", "b", "x"]
    page = listed_items(found, {"limit": "2"})
    assert page["has_more"] and page["data"][0]["content"][0]["text"] == "b"
    last = listed_items(found, {"after": page["last_id"]})
    assert not last["has_more"] and last["data"][0]["content"][0]["text"] == "a"
    assert listed_items(found, {"order": "asc"})["data"][0] == last["data"][0]


def test_an_item_is_found_by_its_name():
    body = InputTokensRequest.model_validate({"input": [{"type": "item_reference", "id": "msg_1"}]})
    store = KeptResponses()
    with pytest.raises(DataError, match="there is no item 'msg_1'"):
        responses_request.items_of(body, store.item)
    store.add(kept(1), [], None)
    assert responses_request.items_of(body, store.item) == kept(1)["output"]
