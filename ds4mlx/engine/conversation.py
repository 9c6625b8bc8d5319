"""A conversation of several turns over one decode state: each turn is a sequence of its own."""

import contextlib
from collections.abc import Callable, Generator
from itertools import takewhile
from typing import Any

from ds4mlx.chat import encode_messages, encode_segments, parse_completion
from ds4mlx.engine import room
from ds4mlx.engine.generation import Response, answer, encoded
from ds4mlx.engine.interrupts import undivided
from ds4mlx.engine.requests import check_prompt
from ds4mlx.engine.sampling import Sampler
from ds4mlx.engine.sequence import Sequence
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import RewindError
from ds4mlx.store import KVStore
from ds4mlx.store.policy import Keeper, Policy, take_up
from ds4mlx.text.tokenizer import Tokenizer


class Conversation:
    """Messages so far, and a state that has taken the tokens `fed`: as much of them as possible."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        sampler: Sampler,
        thinking: str = "high",
        system: str | None = None,
        store: KVStore | None = None,
        thinking_budget: int | None = None,
    ):
        self.store, self.thinking_budget = store, thinking_budget
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler
        self.thinking, self.system = thinking, system
        self._forget_state()
        self.reset()

    def reset(self) -> None:
        """Start anew, with the system text."""
        self.keep("evict")
        self.messages: list[dict[str, Any]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self._forget_state()

    def ask(
        self,
        text: str,
        max_tokens: int,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Generator[Response, None, None]:
        """Answer a user's turn.

        An answer that ends early, by closing the iterator or by Ctrl-C, is kept as far as it came.
        A turn that fails, or ends before its first token, leaves the messages as they were.
        """
        thinking, count = self.thinking, len(self.messages)
        pieces: list[str] = []
        answered = False
        try:
            self.messages.append({"role": "user", "content": text})
            with contextlib.closing(self._responses(max_tokens, on_prefill)) as responses:
                for response in responses:
                    answered = True
                    pieces.append(response.text)
                    yield response
        except Exception:
            answered = False
            raise
        finally:
            if answered:
                message = parse_completion("".join(pieces), thinking=thinking)
                del message["malformed"]
                self.messages.append(message)
            else:
                del self.messages[count:]

    def prompt(self) -> str:
        """The official text of the messages so far; a model is given their `encode_segments`."""
        return encode_messages(
            self.messages, thinking=self.thinking, release=self.model.args.release
        )

    def keep(self, reason: str) -> None:
        """Save what the state holds, as it is about to be given up."""
        if self.store is not None and self.fed:
            Keeper(self.store, self.fed, self.cache, Policy()).end(reason)

    def _responses(
        self, max_tokens: int, on_prefill: Callable[[int, int], None] | None
    ) -> Generator[Response, None, None]:
        """The answer to the messages; afterwards `fed` are the tokens that the state has taken."""
        prompt = encode_segments(self.messages, self.thinking, release=self.model.args.release)
        ids = encoded(prompt, self.tokenizer, self.store)
        self._take_up(ids)
        check_prompt(self.model.args, ids, 0, max_tokens)
        tokens = len(ids) + max_tokens
        room.of_model(self.model, tokens, saving=self.store is not None).check()
        sequence = Sequence(
            ids,
            self.cache,
            self.tokenizer,
            sampler=self.sampler,
            max_tokens=max_tokens,
            thinking_budget=self.thinking_budget,
        )
        keeper = None
        if self.store is not None:
            keeper = Keeper(self.store, sequence.tokens, self.cache, Policy())
        try:
            yield from answer(self.model, sequence, on_prefill=on_prefill, keeper=keeper)
        except Exception:
            self._forget_state()  # it may hold a part of a step
            raise
        finally:
            self.fed = sequence.tokens[: self.cache.offset]

    def _take_up(self, ids: list[int]) -> None:
        """Have the state take as much of `ids` as it shares with them, or the store can give."""
        shared = self._rewind(ids)
        if self.store is not None:
            with undivided():
                self.cache, shared = take_up(self.store, ids, self.cache, shared)
                self.fed = ids[:shared]

    def _forget_state(self) -> None:
        self.cache, self.fed = self.model.make_cache(), []

    def _rewind(self, ids: list[int]) -> int:
        """Step the state back to what it shares with `ids`; how many tokens of them that is."""
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], self.fed, strict=False))
        shared = sum(1 for _ in equal)
        with undivided():
            try:
                self.cache.rewind(shared)
            except RewindError as error:
                shared = error.below
                self.cache.rewind(shared)
            self.fed = ids[:shared]
        return shared
