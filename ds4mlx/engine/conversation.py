"""A conversation of several turns over one decode state, and the interactive chat around it."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

from ds4mlx.chat import encode_messages, encode_segments, parse_completion
from ds4mlx.engine.generation import Response, encoded, stream_generate
from ds4mlx.engine.interrupts import undivided
from ds4mlx.engine.sampling import Sampler
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import RewindError
from ds4mlx.store import KVStore
from ds4mlx.store.policy import Keeper, Policy, take_up
from ds4mlx.text.tokenizer import Tokenizer


class Conversation:
    """Messages so far, and a state that already holds as much of their text as possible."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        sampler: Sampler,
        thinking: str = "high",
        system: str | None = None,
        store: KVStore | None = None,
    ):
        self.store = store
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
                answer = parse_completion("".join(pieces), thinking=thinking)
                del answer["malformed"]
                self.messages.append(answer)
            else:
                del self.messages[count:]

    def prompt(self) -> str:
        """The official text of the messages so far; a model is given their `encode_segments`."""
        return encode_messages(
            self.messages, thinking=self.thinking, release=self.model.args.release
        )

    def _responses(
        self, max_tokens: int, on_prefill: Callable[[int, int], None] | None
    ) -> Generator[Response, None, None]:
        """The answer to the messages; afterwards `held` says what the state holds."""
        prompt = encode_segments(self.messages, self.thinking, release=self.model.args.release)
        ids = encoded(prompt, self.tokenizer, self.store)
        start = self._take_up(ids)
        responses = stream_generate(
            self.model,
            self.tokenizer,
            ids[start:],
            max_tokens,
            sampler=self.sampler,
            cache=self.cache,
            on_prefill=on_prefill,
            store=self.store,
            held=self.held,
        )
        try:
            for response in responses:
                ids.append(response.token)
                yield response
        except Exception:
            self._forget_state()  # it may hold a part of a step
            raise
        finally:
            self.held = ids[: self.cache.offset]

    def keep(self, reason: str) -> None:
        """Save what the state holds, as it is about to be given up."""
        if self.store is not None and self.held:
            Keeper(self.store, self.held, self.cache, Policy()).end(reason)

    def _take_up(self, ids: list[int]) -> int:
        """Have the state hold as much of `ids` as it or the store can give; how many tokens."""
        shared = self._rewind(ids)
        if self.store is not None:
            with undivided():
                self.cache, shared = take_up(self.store, ids, self.cache, shared)
                self.held = ids[:shared]
        return shared

    def _forget_state(self) -> None:
        self.cache, self.held = self.model.make_cache(), []

    def _rewind(self, ids: list[int]) -> int:
        """Step the state back to what it shares with `ids`; how many tokens of them it holds."""
        pairs = zip(ids[:-1], self.held, strict=False)
        shared = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        shared = min(len(ids) - 1, len(self.held)) if shared is None else shared
        with undivided():
            try:
                self.cache.rewind(shared)
            except RewindError as error:
                shared = error.below
                self.cache.rewind(shared)
            self.held = ids[:shared]
        return shared
