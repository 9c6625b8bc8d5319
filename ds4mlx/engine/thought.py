"""Thoughts: where in an answer they are, how long they get, and when they have to end."""

from collections.abc import Sequence

from ds4mlx.chat.tokens import THINK, THINK_END
from ds4mlx.engine.requests import check_count
from ds4mlx.text.tokenizer import Tokenizer


class Thought:
    """What lies between the tokens <think> and </think>, at the end of a prompt and behind it.

    budget: how many tokens may be drawn inside, in all; as many as one likes if None.
    is_open: whether the next token is inside. drawn: how many were. closing: the token </think>.
    Raises DataError for a budget that is no count.
    """

    def __init__(self, prompt: Sequence[int], tokenizer: Tokenizer, budget: int | None = None):
        if budget is not None:
            check_count("thinking_budget", budget)
        self._budget, self._ending, self.drawn = budget, False, 0
        self._opening, self.closing = map(tokenizer.encoder.token_to_id, (THINK, THINK_END))
        ends = (t for t in reversed(prompt) if t in (self._opening, self.closing))
        self.is_open = next(ends, None) == self._opening is not None

    @property
    def must_close(self) -> bool:
        """Whether the next token is </think>, whatever the logits say."""
        return self.is_open and (self._ending or self._left == 0)

    @property
    def may_be_closed(self) -> bool:
        """Whether one of the next two tokens may be forced, as far as is known now."""
        return self._ending or (self._left is not None and self._left < 2)

    def end(self) -> None:
        """Have the thought that is open end now."""
        self._ending = self.is_open

    def add(self, token: int) -> None:
        """Take a token."""
        if self.is_open and token != self.closing:
            self.drawn += 1
        elif self.is_open or token == self._opening:
            self.is_open, self._ending = not self.is_open, False

    @property
    def _left(self) -> int | None:
        return None if self._budget is None else max(self._budget - self.drawn, 0)
