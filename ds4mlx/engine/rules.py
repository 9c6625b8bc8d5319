"""Rules that an answer must obey from the end of its thought on, followed by llguidance.

Owns the only import of llguidance, which the extra `server` installs: a tokenizer in its form, what
work it may do, and the mask of an answer. `schemas` and `tool_rules` say which rules there are.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.text.tokenizer import Tokenizer

# llguidance's bounds, in its units: together well below a second of work at the start, and some
# tens of milliseconds for a token.
_LIMITS = {
    "initial_lexer_fuel": 2_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_KNOWN: WeakKeyDictionary[Tokenizer, Any] = WeakKeyDictionary()


@dataclass(frozen=True)
class Rule:
    """What an answer must be, in llguidance's grammar; `name` is what errors call it."""

    grammar: str
    name: str = "the rule"

    def start(self, tokenizer: Tokenizer) -> "Mask":
        """The mask of an answer that begins now. Raises DataError for a rule that is no good."""
        matcher = _library().LLMatcher(
            _known(tokenizer), self.grammar, log_level=0, limits=_limits()
        )
        return Mask(matcher, self.name)


class Mask:
    """Which tokens may come next, as one answer goes on."""

    def __init__(self, matcher: Any, name: str):
        self._matcher, self._name = matcher, name
        self._check()

    @property
    def done(self) -> bool:
        """Whether only the end of the answer may follow."""
        return self._matcher.is_stopped()

    def allowed(self, vocab: int) -> mx.array:
        """bool (vocab,): the tokens that may come next; at least one, if only that of the end.

        Raises DataError where the rule asks for more work than is allowed for a token.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.zeros(vocab, np.bool_)
        known = np.unpackbits(bits, count=min(vocab, 8 * len(bits)), bitorder="little")
        allowed[: len(known)] = known
        return mx.array(allowed)  # type: ignore[arg-type]

    def took(self, token: int) -> None:
        """Take the token that was drawn, which must be one of those."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DataError(
                f"{self._name} cannot be followed: {one_line(self._matcher.get_error())}"
            )


def compiled(rule: Rule) -> Rule:
    """The rule, if it is one that can be begun. Raises DataError, naming it and the cause."""
    fault = _library().LLMatcher.validate_grammar(rule.grammar, None, limits=_limits())
    if fault and not fault.startswith("WARNING"):
        raise DataError(f"{rule.name} cannot be used: {one_line(fault)}")
    return rule


def grammar_of_schema(schema: Any, options: dict[str, Any]) -> str:
    """llguidance's grammar of a JSON schema, which is not checked here."""
    return _library().LLMatcher.grammar_from_json_schema(schema, overrides=options)


def one_line(message: str) -> str:
    """The beginning of a library's message, without its place in generated text."""
    return message.strip().split("\n")[0][:300]


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise DataError(
            "answers by a rule need llguidance, which `pip install 'ds4mlx[server]'` installs"
        ) from None
    return llguidance


def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(**_LIMITS)


class _Vocabulary:
    """A tokenizer as llguidance asks for it; special tokens match no text, whatever the file says."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id

    @cached_property
    def special_token_ids(self) -> list[int]:
        return [t for t in range(self._tokenizer.vocab_size) if self._tokenizer.is_added(t)]

    @cached_property
    def tokens(self) -> list[bytes]:
        return [self._tokenizer.token_bytes(t) for t in range(self._tokenizer.vocab_size)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_segments([(text, False)])


def _known(tokenizer: Tokenizer) -> Any:
    """The tokenizer in llguidance's form, which takes a second to make."""
    if tokenizer not in _KNOWN:
        library = _library()
        _KNOWN[tokenizer] = library.LLTokenizer(library.TokenizerWrapper(_Vocabulary(tokenizer)))
    return _KNOWN[tokenizer]
