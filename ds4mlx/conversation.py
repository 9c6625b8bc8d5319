"""A conversation of several turns over one decode state, and the interactive chat around it."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from ds4mlx.cache import RewindError
from ds4mlx.chat import encode_messages, parse_completion
from ds4mlx.errors import DataError
from ds4mlx.generation import Response, stream_generate
from ds4mlx.model import Model
from ds4mlx.sampling import Sampler
from ds4mlx.terminal import Printer, show, timing
from ds4mlx.tokenizer import Tokenizer

HELP = """\
/think none|low|high|max   how much the model reasons before it answers
/system TEXT               set the system text and start anew
/reset                     forget the conversation
/quit                      leave (as Ctrl-D does); Ctrl-C ends an answer"""


class Conversation:
    """Messages so far, and a state that already holds as much of their text as possible."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        sampler: Sampler,
        thinking: str = "high",
        system: str | None = None,
    ):
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler
        self.thinking = thinking
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Start anew, with this system text."""
        self.messages: list[dict[str, Any]] = []
        if system:
            self.messages.append({"role": "system", "content": system})
        self.cache, self.held = self.model.make_cache(), []

    def ask(self, text: str, max_tokens: int) -> Iterator[Response]:
        """Answer a user's turn. The message is kept however the answer ends, early included."""
        self.messages.append({"role": "user", "content": text})
        ids = self.tokenizer.encode(self.prompt())
        pieces: list[str] = []
        tokens: list[int] = []
        start = self._rewind(ids)
        try:
            for response in stream_generate(
                self.model,
                self.tokenizer,
                ids[start:],
                max_tokens,
                sampler=self.sampler,
                cache=self.cache,
            ):
                pieces.append(response.text)
                tokens.append(response.token)
                yield response
        finally:
            self.held = (ids + tokens)[: self.cache.offset]
            answer = parse_completion("".join(pieces), thinking=self.thinking)
            self.messages.append(
                {key: value for key, value in answer.items() if key != "malformed"}
            )

    def prompt(self) -> str:
        """The official text of the messages so far."""
        return encode_messages(
            self.messages, thinking=self.thinking, release=self.model.args.release
        )

    def _rewind(self, ids: list[int]) -> int:
        """Step the state back to what it shares with `ids`; how many tokens of them it holds."""
        pairs = zip(ids[:-1], self.held, strict=False)
        shared = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        shared = min(len(ids) - 1, len(self.held)) if shared is None else shared
        try:
            self.cache.rewind(shared)
        except RewindError as error:
            shared = error.below
            self.cache.rewind(shared)
        return shared


def interact(conversation: Conversation, max_tokens: int) -> None:
    """Read turns from stdin until its end; answers go to stdout, notes to stderr."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print("/help lists the commands", file=sys.stderr)
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if line.startswith("/"):
            if not command(conversation, line):
                return
        elif line:
            turn(conversation, line, max_tokens)


def turn(conversation: Conversation, line: str, max_tokens: int) -> None:
    """One question and its answer; a failure ends the turn, not the chat."""
    try:
        printer = Printer(sys.stdout, conversation.thinking != "none")
        seen, _ = show(conversation.ask(line, max_tokens), printer)
        if seen:
            print(timing(seen[-1]), file=sys.stderr)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)


def command(conversation: Conversation, line: str) -> bool:
    """Carry out a line that begins with a slash; False to leave."""
    name, _, argument = line.partition(" ")
    if name == "/quit":
        return False
    if name == "/reset":
        conversation.reset()
    elif name == "/system":
        conversation.reset(argument)
    elif name == "/think" and argument in ("none", "low", "high", "max"):
        conversation.thinking = argument
    else:
        print(HELP, file=sys.stderr)
    return True
