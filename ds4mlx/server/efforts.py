"""How much a request asks the model to think: the words of all protocols, as the encoding's four."""

from ds4mlx.server.errors import Refusal

# What a request that says nothing gets, as at the model's own service.
USUAL = "high"
_LEVELS = {
    "none": "none",
    "disabled": "none",
    "off": "none",
    "minimal": "low",
    "low": "low",
    "medium": "high",
    "high": "high",
    "xhigh": "high",
    "max": "max",
    "ultra": "max",
}


def level(word: str) -> str:
    """none, low, high or max. Raises Refusal for an effort that no protocol has."""
    if word.lower() not in _LEVELS:
        raise Refusal(400, f"the effort {word[:80]!r} is not one of {', '.join(_LEVELS)}")
    return _LEVELS[word.lower()]
