"""Fields of JSON from a client: each is read as what it must be, or refused by name."""

import contextlib
import json
from collections.abc import Collection, Mapping
from reprlib import repr as short
from typing import Any

from ds4mlx.chat.markup import to_json
from ds4mlx.errors import DataError


def field(value: Any, key: str, kind: type, where: str) -> Any:
    """value[key], which must be text or an object."""
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object, not {short(value)}")
    if not isinstance(value.get(key), kind):
        noun = "text" if kind is str else "an object"
        raise DataError(f"{where} needs {noun} as its {key}, not {short(value.get(key))}")
    return value[key]


def items(value: Any, key: str, where: str) -> list[Any]:
    """The list, [] for None."""
    if value is not None and not isinstance(value, list | tuple):
        raise DataError(f"{where}: {key} must be a list, not {short(value)}")
    return list(value or ())


def text(value: Any, key: str, where: str) -> str:
    """The text, "" for None; half a surrogate pair could not be tokenised later."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {key} must be text, not {short(value)}")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key} is not Unicode text: {error.reason}") from error
    return value or ""


def as_json(value: Any, where: str) -> str:
    """The value as JSON."""
    try:
        return to_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where} holds what JSON cannot: {error}") from error


def only(value: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    """Refuses a key that is not known, unless nothing is under it."""
    for key, inner in value.items():
        if key not in known and inner not in (None, "", [], {}, False):
            raise DataError(f"{where}: the key {short(key)} is not one that is read here")


def no_repeats(raw: str, where: str) -> None:
    """Refuses JSON text in which an object has a key twice; other text is none of its business."""

    repeated: list[str] = []

    def check(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                repeated.append(key)
            seen.add(key)

    with contextlib.suppress(ValueError, RecursionError):
        json.loads(raw, object_pairs_hook=check)
    if repeated:
        raise DataError(f"{where}: the key {short(repeated[0])} is given twice")
