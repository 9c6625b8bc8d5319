"""The interactive chat: a person's messages in, answers out, and the commands in between."""

import re
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ds4mlx.cli.answer import show
from ds4mlx.cli.messages_in import Lines, Typed, can_type, quiet
from ds4mlx.cli.printer import Printer
from ds4mlx.cli.terminal import note, progress
from ds4mlx.engine.conversation import Conversation
from ds4mlx.errors import DataError

THINKING = ("none", "low", "high", "max")
COMMANDS = ("/think", "/system", "/file", "/reset", "/help", "/quit")
# What these commands take, said where it is missing.
TAKEN = {
    "/think": f"one of {', '.join(THINKING)}",
    "/file": "the path of a file, and after it any text",
}
WORDS = {"exit": "/quit", "quit": "/quit", "/exit": "/quit"}
WORDS |= {"help": "/help", "?": "/help", "/?": "/help"}

HELP = """\
/think none|low|high|max   set how much the model reasons before it answers
/system TEXT               set the system text and start anew
/file PATH [TEXT]          send what is in a file, followed by TEXT
/reset                     forget the conversation, not the system text
/quit                      leave, as exit, quit and Ctrl-D do; Ctrl-C ends an answer
A line that ends with a backslash goes on in the next one, and a pasted text of several lines is
one message. A message that begins with one of these words begins with a space."""


@dataclass
class Chat:
    """A conversation, and how its answers are shown."""

    conversation: Conversation
    max_tokens: int
    reasoning: bool | None = None  # whether it is shown; None where the output decides

    def banner(self, name: str) -> str:
        """Which model this is, how much fits, and where help is."""
        sizes = self.conversation.model.args
        return (
            f"{name}: {sizes.num_hidden_layers} layers, release {sizes.release}; a conversation of "
            f"{sizes.max_position_embeddings:,} tokens fits\n/help lists the commands"
        )


def interact(chat: Chat, name: str) -> None:
    """Read messages from stdin until its end; answers go to stdout, notes to stderr."""
    if can_type():
        note(chat.banner(name))
    messages = Typed() if can_type() else Lines()
    while True:
        try:
            if not respond(chat, messages.next()):
                return
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt, or just after an answer
            note("")


def respond(chat: Chat, message: str) -> bool:
    """Carry out a command or answer a message; False to leave."""
    asked = as_command(message)
    if asked is not None:
        return command(chat, *asked)
    if message.strip():
        turn(chat, message.strip())
    return True


def as_command(message: str) -> tuple[str, str] | None:
    """(name, argument) of a command; None for what goes to the model.

    Text that begins with a path, a comment or a space goes to the model; one word behind a slash
    that is neither a command nor a file is a command that there is not.
    """
    message = message.rstrip()
    word, _, argument = message.partition(" ")
    if message.lower() in WORDS:
        return WORDS[message.lower()], ""
    if word in COMMANDS:
        return word, argument.strip()
    mistyped = re.fullmatch(r"/[A-Za-z-]+", word) and "\n" not in message
    return (word, argument.strip()) if mistyped and not Path(word).exists() else None


def turn(chat: Chat, message: str) -> None:
    """One message and its answer; a failure ends the turn, not the chat."""
    conversation = chat.conversation
    printer = Printer(sys.stdout, conversation.thinking != "none", chat.reasoning)
    answer = conversation.ask(message, chat.max_tokens, partial(progress, "prompt", "tokens"))
    try:
        with quiet():
            show(answer, printer)
    except DataError as error:
        note(f"error: {error}")


def command(chat: Chat, name: str, argument: str) -> bool:
    """Carry out a command; False to leave."""
    conversation = chat.conversation
    if name == "/quit":
        return False
    if name == "/reset":
        conversation.reset()
        note("the conversation is forgotten")
    elif name == "/system":
        conversation.system = argument
        conversation.reset()
        note("a new conversation begins")
    elif name == "/think" and argument in THINKING:
        conversation.thinking = argument
        note(f"thinking: {argument}")
    elif name == "/file" and argument:
        send_file(chat, argument)
    elif name == "/help":
        note(HELP)
    elif name in TAKEN:
        note(f"{name} takes {TAKEN[name]}{f', not {argument!r}' if argument else ''}")
    else:
        note(f"no such command: {f'{name} {argument}'.rstrip()}\n{HELP}")
    return True


def send_file(chat: Chat, argument: str) -> None:
    """A turn with the text of a file, and with what follows its name."""
    path, rest = _path_and_rest(argument)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        return note(f"error: {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        return note(f"error: {path}: not UTF-8 text: {error.reason} at byte {error.start}")
    message = f"{text}\n\n{rest}" if rest else text
    if not message.strip():
        return note(f"error: {path}: is empty")
    return turn(chat, message)


def _path_and_rest(argument: str) -> tuple[Path, str]:
    """The whole argument is a path if there is such a file; else its first word is, quoted or not."""
    whole = Path(argument).expanduser()
    words = re.match(r"""("[^"]*"|'[^']*'|(?:\\.|\S)+)\s*(.*)""", argument, re.DOTALL)
    if whole.exists() or words is None:
        return whole, ""
    try:
        (name,) = shlex.split(words[1])
    except ValueError:
        return whole, ""
    return Path(name).expanduser(), words[2]
