"""Rules for answers in JSON: any object, or what a JSON schema describes.

llguidance says which schemas it can follow. What would make it work or an answer go on without end
is refused here, before it sees it.
"""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from ds4mlx.engine.rules import Rule, schema_grammar
from ds4mlx.errors import DataError

LONGEST = 1 << 20  # characters of a schema
MOST = 100_000  # items, characters or keys that a schema may ask for at least
MOST_PATTERNS = 8  # that one string must match together; every further one costs fourfold
# White space between two tokens of JSON: little, as small models write it forever.
_SPACE = r"\r?\n[ \t]{0,64}|[ \t]{1,4}"
_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": _SPACE,
    "coerce_one_of": False,
    "lenient": False,
}
_COUNTS = ("minItems", "minLength", "minProperties")
_VALUES = ("const", "enum", "default", "examples")


def json_object() -> Rule:
    """Any JSON object."""
    return json_schema({"type": "object"}, "JSON mode")


def json_schema(schema: Any, name: str = "the JSON schema") -> Rule:
    """JSON that a schema describes: an object, or true or false.

    Raises DataError for what is no schema, for parts of it that cannot be followed, by name, and
    for what nothing fulfils. Formats that llguidance does not know are such parts.
    """
    if not isinstance(schema, dict | bool):
        raise DataError(f"{name} must be an object, not {schema!r:.80}")
    if schema is False:
        raise DataError(f"{name} is false, which nothing fulfils")
    schema = {} if schema is True else schema
    try:
        text = json.dumps(schema, allow_nan=False)
        text.encode()
        checked(schema, text, name)
        return Rule(schema_grammar(text, _OPTIONS), name, of_all=True)
    except DataError:
        raise
    except RecursionError:
        raise DataError(f"{name} is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is not JSON: {error}") from None


def guided(schema: Any) -> dict[str, Any]:
    """A schema that can be followed, as part of a grammar."""
    return {**(schema if isinstance(schema, dict) else {}), "x-guidance": _OPTIONS}


def checked(schema: Any, text: str, name: str) -> None:
    """Raises DataError for a schema, which is `text`, that would take too much work."""
    if len(text) > LONGEST:
        raise DataError(f"{name} has {len(text)} characters, and {LONGEST} are the most")
    known: dict[int, int] = {}
    for part in _parts(schema):
        for key in _COUNTS:
            least = part.get(key)
            if isinstance(least, int | float) and least > MOST:
                raise DataError(f"{name} asks for a {key} of {least}, and {MOST} is the most")
        if _patterns(part, schema, known, name) > MOST_PATTERNS:
            raise DataError(
                f"{name} has one value match more than {MOST_PATTERNS} patterns together"
            )


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """All objects of a schema, whether they are schemas or lists of them by name."""
    if isinstance(schema, list):
        for part in schema:
            yield from _parts(part)
    elif isinstance(schema, dict):
        yield schema
        for key, part in schema.items():
            if key not in _VALUES:
                yield from _parts(part)


def _patterns(part: Any, schema: Any, known: dict[int, int], name: str) -> int:
    """How many patterns one value has to match by this part; those that lie in a circle once."""
    if not isinstance(part, dict):
        return 0
    if id(part) not in known:
        known[id(part)] = 0
        joined = [*_list(part, "allOf"), target(part, schema, name)]
        one_of = [
            _patterns(each, schema, known, name)
            for key in ("anyOf", "oneOf")
            for each in _list(part, key)
        ]
        count = sum(_patterns(each, schema, known, name) for each in joined)
        known[id(part)] = count + max(one_of, default=0) + isinstance(part.get("pattern"), str)
    return known[id(part)]


def _list(part: dict[str, Any], key: str) -> list[Any]:
    return part[key] if isinstance(part.get(key), list) else []


def target(part: dict[str, Any], schema: Any, name: str) -> Any:
    """What the $ref of a part points to in the schema, None without one. Raises DataError."""
    place = part.get("$ref")
    if not isinstance(place, str):
        return None
    found, steps = schema, unquote(place).split("/")
    try:
        if steps.pop(0) != "#":
            raise KeyError(place)
        for step in steps:
            step = step.replace("~1", "/").replace("~0", "~")
            found = found[int(step) if isinstance(found, list) else step]
    except (KeyError, IndexError, ValueError, TypeError):
        raise DataError(f"{name} has a $ref to {place:.80}, which is nowhere in it") from None
    return found
