"""The interactive chat: a person's lines in, answers out."""

import contextlib
import sys
from functools import partial

from ds4mlx.cli.terminal import Printer, progress, show, timing
from ds4mlx.engine.conversation import Conversation
from ds4mlx.errors import DataError

THINKING = ("none", "low", "high", "max")


HELP = """\
/think none|low|high|max   how much the model reasons before it answers
/system TEXT               set the system text and start anew
/reset                     forget the conversation, not the system text
/quit                      leave (as Ctrl-D does); Ctrl-C ends an answer"""


def interact(conversation: Conversation, max_tokens: int) -> None:
    """Read turns from stdin until its end; answers go to stdout, notes to stderr."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()
    if sys.stdin.isatty():
        note("/help lists the commands")
    while True:
        try:
            if not respond(conversation, read_line(), max_tokens):
                return
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt, or just after an answer
            note("")


def read_line() -> str:
    """The next line of stdin. A person is asked for it; the end of the file ends their line too."""
    if not sys.stdin.isatty():
        return input().strip()
    prompt = "> "
    if not sys.stdout.isatty():  # where input() would write it among the answers
        sys.stderr.write(prompt)
        sys.stderr.flush()
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        note("")
        raise


def respond(conversation: Conversation, line: str, max_tokens: int) -> bool:
    """Carry out a command or answer a question; False to leave."""
    if line.startswith("/"):
        return command(conversation, line)
    if line:
        turn(conversation, line, max_tokens)
    return True


def turn(conversation: Conversation, line: str, max_tokens: int) -> None:
    """One question and its answer; a failure ends the turn, not the chat."""
    printer = Printer(sys.stdout, conversation.thinking != "none")
    answer = conversation.ask(line, max_tokens, partial(progress, "prompt", "tokens"))
    try:
        last, _ = show(answer, printer)
        if last is not None:
            note(timing(last))
    except DataError as error:
        note(f"error: {error}")


def command(conversation: Conversation, line: str) -> bool:
    """Carry out a line that begins with a slash; False to leave."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
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
    else:
        note(HELP if name == "/help" else f"no such command: {line}\n{HELP}")
    return True


def note(text: str) -> None:
    """A line that is no answer."""
    print(text, file=sys.stderr)
