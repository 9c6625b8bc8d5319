"""Rules that an answer must obey from the end of its thought on, followed by llguidance.

Owns what uses llguidance, which the extra `server` installs and which is imported only when it is
needed: a tokenizer in its form, the work it may do, and the mask of an answer. What rules there are
is said in `schemas` and `tool_rules`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ds4mlx.chat.tokens import DSML
from ds4mlx.errors import DataError
from ds4mlx.text.tokenizer import Tokenizer

# What stands in a grammar for the token that marks tool markup, whose id each tokenizer has its own.
MARK = "<[ds4mlx-mark]>"
# White space with which JSON may begin, and our grammars of it do not.
_BLANK = " \t\r\n"
# llguidance's bounds, in its own units: less than a second of work at the start, and some tens of
# milliseconds for a token, whatever the rule is.
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "max_items_in_row": 8_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_KNOWN: WeakKeyDictionary[Tokenizer, Any] = WeakKeyDictionary()


class RuleError(DataError):
    """A rule that no answer can follow, or only with more work than is allowed."""


@dataclass(frozen=True)
class Rule:
    """What an answer must be.

    grammar: in llguidance's language, with MARK for the token that marks tool markup. name: what
    errors call the rule. of_all: whether it is about all of an answer, and not about how one goes on.
    begun: what there is of the answer. Raises RuleError, with the cause, for one that no answer can
    follow.
    """

    grammar: str
    name: str
    of_all: bool = False
    begun: str = ""

    def __post_init__(self) -> None:
        Mask(self, _bytes(), 257).allowed(258)

    def after(self, begun: str) -> "Rule":
        """The rule for an answer that a client has begun."""
        return replace(self, begun=begun) if self.of_all else self

    def start(self, tokenizer: Tokenizer) -> "Mask":
        """The mask of an answer that begins now, or goes on behind what is begun.

        Raises RuleError for a beginning of no answer that obeys the rule.
        """
        mask = Mask(self, prepare(tokenizer), tokenizer.encoder.token_to_id(DSML))
        mask.begin(tokenizer.encode_segments([(self.begun.lstrip(_BLANK), False)]))
        return mask


class Mask:
    """Which tokens may come next while one answer goes on."""

    def __init__(self, rule: Rule, vocabulary: Any, mark: int | None):
        self._name = rule.name
        if mark is None and MARK in rule.grammar:
            raise DataError(f"{rule.name} cannot be followed: the tokenizer has no token {DSML}")
        grammar = rule.grammar.replace(MARK, f"<[{mark}]>")
        library = _library()
        limits = library.LLParserLimits(**_LIMITS)
        self._matcher = library.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        self._check()

    @property
    def done(self) -> bool:
        """Whether only the end of the answer may follow."""
        return self._matcher.is_stopped()

    def allowed(self, vocab: int) -> mx.array:
        """bool (vocab,): the tokens that may come next, be it only the one that ends the answer.

        Raises RuleError where that takes more work than a token may.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        known = np.unpackbits(bits, count=min(vocab, 8 * len(bits)), bitorder="little")
        return mx.array(np.pad(known, (0, vocab - len(known)))) != 0

    def begin(self, tokens: list[int]) -> None:
        """Take the beginning of an answer. Raises RuleError unless the answer may begin so."""
        taken = self._matcher.try_consume_tokens(tokens)
        self._check()
        if taken < len(tokens):
            raise RuleError(
                f"the beginning of the answer that is given cannot go on to one that obeys {self._name}"
            )

    def took(self, token: int) -> None:
        """Take the token that was drawn, which is one of those."""
        if not self.done:
            self._matcher.consume_token(token)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuleError(f"{self._name} cannot be followed: {_cause(self._matcher.get_error())}")


def _cause(error: str) -> str:
    """An error of llguidance's in one line, without the marks that point into a pattern."""
    if error.strip().startswith("NoExtension"):
        return "nothing fulfils it"
    lines = [line.strip() for line in error.splitlines() if line.strip(" ^~")]
    # Of a long pattern the beginning will do; what is wrong with it is said behind it.
    return " ".join([*(line[:120] for line in lines[:-1]), *lines[-1:]])[:300]


def prepare(tokenizer: Tokenizer) -> Any:
    """llguidance's form of a tokenizer; made once, which takes a large one about a second.

    Raises DataError for a tokenizer that has no tokens, which stands in for one that is not there.
    """
    if not tokenizer.vocab_size:
        raise DataError("an answer cannot obey a rule without a tokenizer")
    if tokenizer not in _KNOWN:
        ids = range(tokenizer.vocab_size)
        special = [token for token in ids if tokenizer.is_added(token)]
        spellings = [tokenizer.token_bytes(token) for token in ids]
        _KNOWN[tokenizer] = _vocabulary(
            spellings,
            special,
            tokenizer.eos_token_id,
            lambda text: tokenizer.encode_segments([(text, False)]),
        )
    return _KNOWN[tokenizer]


def schema_grammar(schema: str, options: dict[str, Any]) -> str:
    """llguidance's grammar of a JSON schema in JSON text, which is not checked yet."""
    return _library().LLMatcher.grammar_from_json_schema(schema, overrides=options)


@cache
def _bytes() -> Any:
    """A vocabulary of bytes, on which rules are tried: an end at 256, a mark at 257."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"end", b"mark"]
    return _vocabulary(tokens, [256, 257], 256, lambda text: list(text.encode()))


def _vocabulary(*parts: Any) -> Any:
    library = _library()
    return library.LLTokenizer(library.TokenizerWrapper(_Vocabulary(*parts)))


class _Vocabulary:
    """Tokens as llguidance asks for them. A special one matches no text, whatever it spells."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Sequence[int],
        end: int,
        encode: Callable[[str], list[int]],
    ):
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id, self.bos_token_id = end, None
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text; where only one text may follow, it is written in these."""
        if not isinstance(text, str):
            raise TypeError("only text, which is how llguidance asks whether bytes would do")
        return self._encode(text)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise DataError(
            "answers that obey a rule take llguidance: install it with the server,"
            " pip install 'ds4mlx[server]'"
        ) from None
    return llguidance
