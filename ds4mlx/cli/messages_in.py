"""Where a chat's messages come from: a person at a terminal, or the lines of a pipe.

In both a line that ends with a backslash goes on in the next one.
"""

import contextlib
import os
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output

PROMPT, MORE = "> ", "... "
PASTES_MARKED, PASTES_PLAIN = "\x1b[?2004h", "\x1b[?2004l"


class Lines:
    """The lines of standard input."""

    def next(self) -> str:
        """The next message; raises EOFError at the end."""
        message = ""
        while line := sys.stdin.readline():
            message += line.rstrip("\r\n")
            if not message.endswith("\\"):
                return message
            message = message[:-1] + "\n"
        if not message:
            raise EOFError
        return message


class Typed:
    """What a person types: lines that can be edited, with the history of earlier chats.

    A pasted text of several lines is one message. The prompt goes to stdout, or to stderr where
    stdout is no terminal.
    """

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            key_bindings=_bindings(),
            multiline=True,
            prompt_continuation=MORE,
            output=_output(),
        )

    def next(self) -> str:
        """The next message; raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C."""
        # With a colour of its own, if only the usual one, the space behind the mark is written too.
        return self._session.prompt([("fg:ansidefault", PROMPT)])


def can_type() -> bool:
    """Whether a person sits at standard input and sees what is typed."""
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


def _output() -> Output | None:
    """Where the prompt goes; None for a dumb terminal, which the library treats in a way of its own."""
    if os.environ.get("TERM") == "dumb":
        return None
    output = create_output(sys.stdout if sys.stdout.isatty() else sys.stderr)
    # Asking the terminal where the cursor is would cost a second where it does not answer.
    output.enable_cpr = False  # type: ignore[attr-defined]
    return output


def _bindings() -> KeyBindings:
    """Enter sends, or goes on in a new line behind a backslash; Alt-Enter always goes on."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text.endswith("\\"):
            buffer.cursor_position = len(buffer.text)
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _go_on(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _history() -> History:
    """What was typed in earlier chats, for this user's eyes only; of this chat if it cannot be kept."""
    path = state_directory() / "chat-history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def state_directory() -> Path:
    """Where this user's programs keep what they cannot make again."""
    named = os.environ.get("XDG_STATE_HOME")
    if named:
        return Path(named) / "ds4mlx"
    library = Path.home() / "Library" / "Application Support"
    return (library if sys.platform == "darwin" else Path.home() / ".local" / "state") / "ds4mlx"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is typed in the meantime is not shown; it waits for the next prompt. Ctrl-C works."""
    if not can_type():
        yield
        return
    usual = termios.tcgetattr(sys.stdin)
    silent = usual.copy()
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    _write_mode(PASTES_MARKED)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, usual)
        _write_mode(PASTES_PLAIN)


def _write_mode(sequence: str) -> None:
    """Have a terminal mark pastes, so that one which comes early is still one message."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        sys.stdout.write(sequence)
        sys.stdout.flush()
