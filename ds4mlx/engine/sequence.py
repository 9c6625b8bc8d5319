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

from ds4mlx.chat.tokens import THINK, THINK_END
from ds4mlx.engine.sampling import Sampler, draw_key
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.text.stops import StopStrings
from ds4mlx.text.tokenizer import Tokenizer

# What `draw` gives instead of a token where the logits are not finite.
NOT_FINITE = -1


class Sequence:
    """Tokens from position `first` on, of which `state` has taken some, and how they go on.

    sampler: greedy if not given. stop: texts that end the answer and do not appear in it; inside a
    thought, from the token <think> to </think>, they are not looked for. The end-of-sentence token
    ends the answer wherever it comes. `reason` is None until then, then "stop" or "length".
    """

    def __init__(
        self,
        tokens: abc.Sequence[int],
        state: DecodeState,
        tokenizer: Tokenizer,
        *,
        sampler: Sampler | None = None,
        stop: str | abc.Sequence[str] = (),
        max_tokens: int = 100,
        first: int = 0,
    ):
        self.tokens, self.state, self.first = list(tokens), state, first
        self.sampler = sampler or Sampler(temperature=0)
        self.seed = secrets.randbits(64) if self.sampler.seed is None else self.sampler.seed
        self.stops = StopStrings([stop] if isinstance(stop, str) else stop)
        self.max_tokens = max_tokens
        self.text = ""
        self.reason: str | None = None
        self._prompt_end = len(self.tokens)
        self._end_token, self._stream = tokenizer.eos_token_id, tokenizer.stream()
        self._think, self._think_end = map(tokenizer.encoder.token_to_id, (THINK, THINK_END))
        self.thinking = self._opens_a_thought()

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

    def draw(self, logits: mx.array, unread: int = 0) -> mx.array:
        """Logits (1, vocab) after the last token -> the next token, int32 (1,), or NOT_FINITE.

        unread: how many tokens were drawn before it that the sequence has not taken yet.
        Nothing is evaluated: the token can be fed to the model before it is read.
        """
        position = self.first + len(self.tokens) + unread
        token = self.sampler(logits, draw_key(self.seed, position))
        return mx.where(mx.all(mx.isfinite(logits)), token.astype(mx.int32), NOT_FINITE)

    def take(self, token: int) -> str:
        """Append the token that was drawn; the text that it brings, which may be empty."""
        self.tokens.append(token)
        ended = token == self._end_token
        text = "" if ended else self._shown(token)
        if ended or self.stops.reached:
            self.reason = "stop"
        elif self.drawn == self.max_tokens:
            self.reason = "length"
        if self.reason and not self.stops.reached:
            text += self._rest()
        self.text += text
        return text

    def _shown(self, token: int) -> str:
        """The text of a token, less what may become a stop string."""
        text = self._stream.add(token)
        if self.thinking:
            self.thinking = token != self._think_end
            return text
        text = self.stops.add(text)
        if token == self._think and not self.stops.reached:
            self.thinking = True
            text += self.stops.finish()
        return text

    def _rest(self) -> str:
        """What an unfinished character and the beginning of a stop string leave."""
        text = self._stream.finish()
        return text if self.thinking else self.stops.add(text) + self.stops.finish()

    def _opens_a_thought(self) -> bool:
        """Whether the prompt ends inside a thought."""
        ends = (t for t in reversed(self.tokens) if t in (self._think, self._think_end))
        return next(ends, None) == self._think is not None
