"""A sequence: one text that a model continues, from its prompt to the reason for its end.

It owns the tokens, the decode state that follows them, the way the next token is drawn, and the text
given out so far. It runs no model: whoever drives it, alone or with others in one step, feeds
`pending` to the state, has it draw from the logits, and has it take what was drawn. Between two of
these it may be left at any time, and its state is then exactly that of the tokens in `fed`. See
`decoding` for how the next token is computed while the last one is being read.
"""

import secrets
from collections import abc

import mlx.core as mx

from ds4mlx.engine.penalties import LookBack
from ds4mlx.engine.proposals import Proposal, drawn
from ds4mlx.engine.repetition import Repetition
from ds4mlx.engine.rules import Rule
from ds4mlx.engine.sampling import Sampler, draw_key
from ds4mlx.engine.thought import Thought
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.text.stops import StopStrings
from ds4mlx.text.tokenizer import Tokenizer

# What `draw` gives instead of a token where the logits are not finite.
NOT_FINITE = -1


class Sequence:
    """Tokens from position `first` on, of which `state` has taken some, and how they go on.

    sampler: greedy if not given. stop: texts that end the answer and do not appear in it; inside a
    thought, from the token <think> to </think>, they are not looked for, nor from the beginning of
    `until` on. The end-of-sentence token ends the answer wherever it comes.
    rule: what the answer must obey, from the end of a thought on; the thought is then always
    closed. thinking_budget: how many tokens may be drawn in thoughts before </think> is forced.
    guard: end an answer that goes round in circles.
    `reason` is None until the end, then "stop", "length" or "repetition"; `stopped_by` is the stop
    string that ended it, None for all else.
    """

    def __init__(
        self,
        tokens: abc.Sequence[int],
        state: DecodeState,
        tokenizer: Tokenizer,
        *,
        sampler: Sampler | None = None,
        stop: str | abc.Sequence[str] = (),
        until: str = "",
        max_tokens: int = 100,
        first: int = 0,
        rule: Rule | None = None,
        thinking_budget: int | None = None,
        guard: bool = False,
    ):
        self.tokens, self.state, self.first = list(tokens), state, first
        self.sampler = sampler or Sampler(temperature=0)
        self.seed = secrets.randbits(64) if self.sampler.seed is None else self.sampler.seed
        self.stops = StopStrings([stop] if isinstance(stop, str) else stop, until)
        self.max_tokens = max_tokens
        self.text = ""
        self.reason: str | None = None
        self._prompt_end = len(self.tokens)
        self._end_token, self._stream = tokenizer.eos_token_id, tokenizer.stream()
        self._thought = Thought(self.tokens, tokenizer, thinking_budget)
        self._mask = rule.start(tokenizer) if rule else None
        penalties = self.sampler.penalties
        self._back = LookBack(penalties, self.tokens) if penalties else None
        self._repetition = Repetition() if guard else None

    @property
    def fed(self) -> list[int]:
        """The tokens that the state has taken, from position `first` on."""
        return self.tokens[: self.state.offset - self.first]

    @property
    def pending(self) -> list[int]:
        """The tokens that the state has not taken yet: of the prompt, then the last one drawn."""
        return self.tokens[self.state.offset - self.first :]

    @property
    def drawn(self) -> int:
        """How many tokens were drawn."""
        return len(self.tokens) - self._prompt_end

    @property
    def thinking(self) -> bool:
        """Whether the next token is inside a thought."""
        return self._thought.is_open

    @property
    def thought_tokens(self) -> int:
        """How many of the drawn tokens are inside thoughts, their </think> not counted."""
        return self._thought.drawn

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer."""
        return self.stops.found

    @property
    def waits(self) -> bool:
        """Whether the next token cannot be drawn before the last one is taken."""
        return self._mask is not None or self._back is not None or self._thought.may_be_closed

    def end_thinking(self) -> None:
        """Have </think> be the next token if that is inside a thought; else nothing is changed."""
        self._thought.end()

    def key(self, unread: int = 0) -> mx.array:
        """The key of the next draw but `unread` ones."""
        return draw_key(self.seed, self.first + len(self.tokens) + unread)

    def draw(self, logits: mx.array, unread: int = 0, proposal: Proposal | None = None) -> mx.array:
        """Logits (1, vocab) after the last token -> the next token, int32 (1,), or NOT_FINITE.

        unread: how many tokens were drawn before it that the sequence has not taken yet; 0 if it
        `waits`. proposal: a token that may be it. Nothing is evaluated: the token can be fed to the
        model before it is read. Raises DataError if the rule cannot be followed further.
        """
        if self._thought.must_close:
            token = mx.array([self._thought.closing])
        else:
            token = drawn(self.sampler, self._shaped(logits), self.key(unread), proposal)
        return mx.where(mx.all(mx.isfinite(logits)), token.astype(mx.int32), NOT_FINITE)

    def take(self, token: int) -> str:
        """Append the token that was drawn; the text that it brings, which may be empty."""
        self.tokens.append(token)
        self._remember(token)
        ended = token == self._end_token
        text = "" if ended else self._shown(token)
        if ended or self.stops.reached:
            self.reason = "stop"
        elif self._repetition and self._repetition.add(token):
            self.reason = "repetition"
        elif self.drawn == self.max_tokens:
            self.reason = "length"
        if self.reason and not self.stops.reached:
            text += self._rest()
            self.reason = "stop" if self.stops.reached else self.reason
        self.text += text
        return text

    def _shaped(self, logits: mx.array) -> mx.array:
        """Logits (1, vocab) less the penalties; -inf for what the rule forbids."""
        if self._back:
            logits = self._back.penalised(logits)
        if self._mask is None:
            return logits
        if self.thinking:
            allowed = mx.arange(logits.shape[-1]) != self._end_token
        else:
            allowed = self._mask.allowed(logits.shape[-1])
        return mx.where(allowed, logits, -mx.inf)

    def _remember(self, token: int) -> None:
        """What later draws depend on."""
        if self._back:
            self._back.add(token)
        if self._mask is not None and not self.thinking:
            self._mask.took(token)

    def _shown(self, token: int) -> str:
        """The text of a token, less what may become a stop string."""
        text, thinking = self._stream.add(token), self.thinking
        self._thought.add(token)
        if thinking:
            return text
        text = self.stops.add(text)
        if self.thinking and not self.stops.reached:
            text += self.stops.finish()
        return text

    def _rest(self) -> str:
        """What an unfinished character and the beginning of a stop string leave."""
        text = self._stream.finish()
        return text if self.thinking else self.stops.add(text) + self.stops.finish()
