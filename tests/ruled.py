"""Answers that obey a rule, spelled or written at random, and tools that they may call."""

from functools import cache

import numpy as np
import pytest

from ds4mlx.engine.rules import Rule
from ds4mlx.text.tokenizer import Tokenizer

ENOUGH = 60  # tokens after which an answer hurries to its end
TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "next": {"$ref": "#/$defs/tree"}},
    "required": ["name"],
}
READ = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "lines": {"type": "integer", "minimum": 0},
        "mode": {"enum": ["r", 'quoted "</b>"\n', 3, None]},
        "only": {"anyOf": [{"type": "array", "items": {"type": "boolean"}}, {"type": "null"}]},
    },
    "required": ["path"],
}
MANY = {
    "type": "object",
    "properties": {
        "any": {},
        "unsupported": {"type": "object", "not": {}},
        "odd key": {"$ref": "#/$defs/tree"},
        'no "tag" > can': {"type": "string"},
        "gone": {"$ref": "#/$defs/nowhere", "type": "integer"},
        "self": {"$ref": "#/properties/self"},
    },
    "required": ["odd key"],
    "$defs": {"tree": TREE},
}
TOOLS = [
    {"type": "function", "function": {"name": "read_file", "parameters": READ}},
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "ns.many-things", "parameters": MANY}},
    {"type": "function", "function": {"name": "flags", "parameters": {
        "type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}}}},
]  # fmt: skip


def spelled(tokenizer: Tokenizer, rule: Rule, text: str) -> bool:
    """Whether a rule lets a text, in the tokenizer's own tokens, through to its end."""
    mask = rule.start(tokenizer)
    for token in [*tokenizer.encode(text), tokenizer.eos_token_id]:
        if not mask.allowed(tokenizer.vocab_size)[token].item():
            return False
        mask.took(token)
    return mask.done


def written(tokenizer: Tokenizer, rule: Rule, seed: int, begun: str = "") -> str:
    """An answer by random logits, in which what may end something soon gets likely."""
    vocab, (ends, special) = tokenizer.vocab_size, _endings(tokenizer)
    random, mask, tokens = np.random.default_rng(seed), rule.start(tokenizer), []
    for token in tokenizer.encode(begun):
        assert mask.allowed(vocab)[token].item()
        tokens.append(token)
        mask.took(token)
    while len(tokens) < 2000:
        hurry = len(tokens) / ENOUGH * 8
        logits = random.gumbel(size=vocab) + hurry * (ends + 2 * special)
        logits[~np.array(mask.allowed(vocab))] = -np.inf
        token = int(logits.argmax())
        assert np.isfinite(logits[token])
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(tokens)
        tokens.append(token)
        mask.took(token)
    pytest.fail(f"no end to {tokenizer.decode(tokens)[:300]}")


@cache
def _endings(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """bool (vocab,): the tokens that end a value, and those that are special."""
    vocab = tokenizer.vocab_size
    spellings = [tokenizer.token_bytes(token) for token in range(vocab)]
    ends = np.array([s[:1] in (b'"', b"}", b"]") or s == b"</" for s in spellings])
    special = np.array([tokenizer.is_added(token) for token in range(vocab)])
    return ends, special
