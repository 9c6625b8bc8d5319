"""The command line as a real process: on pipes, or on a terminal of its own.

python processes.py N SIGNAL ARGUMENTS: a command that a signal interrupts at its N-th change to the
disk.
"""

import contextlib
import errno
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

COMMAND = [sys.executable, "-m", "ds4mlx"]
PATIENCE = 60  # seconds after which a test gives up


def own_signals():
    """In a process that begins: a hangup reaches it, also where these tests run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def own_terminal():
    """In a process that begins: standard input is its terminal, whose end is a hangup."""
    own_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def environment(**changes):
    """The tests' own, with these variables set, or with None unset."""
    names = {**os.environ, "TERM": "xterm", "NO_COLOR": None, "DS4MLX_MODEL": None, **changes}
    return {name: str(value) for name, value in names.items() if value is not None}


def run(*arguments, stdin=b"", **changes):
    """Run to the end; changes: environment variables."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
        env=environment(**changes),
    )


def start(*arguments, command=COMMAND, **changes):
    """Start with unbuffered pipes; changes: environment variables."""
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(**changes),
        preexec_fn=own_signals,  # noqa: PLW1509 - no thread of the tests holds a lock then
    )


def run_dying(last, number, *arguments, **changes):
    """Run a command that a signal ends at its `last`-th change to the disk."""
    return subprocess.run(
        [sys.executable, __file__, *map(str, (last, int(number), *arguments))],
        capture_output=True,
        check=False,
        timeout=PATIENCE,
        env=environment(**changes),
    )


def writer(fifo, process):
    """Open a named pipe for writing once `process` has it open for reading."""
    while process.poll() is None:
        with contextlib.suppress(OSError):  # ENXIO: nobody reads yet
            return open(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "w")  # noqa: PTH123
        time.sleep(0.01)
    raise AssertionError(f"{fifo} was not read: {process.stderr.read()}")


def interrupt(process):
    """Ctrl-C until it is seen: Python may fall asleep in a read just after the signal came."""
    for _ in range(PATIENCE):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=1)
    process.kill()
    raise AssertionError("Ctrl-C is not seen")


class Terminal:
    """A process that has a pseudo-terminal: what is typed there comes as from a keyboard."""

    def __init__(self, *arguments, **changes):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(**changes),
            start_new_session=True,
            preexec_fn=own_terminal,  # noqa: PLW1509 - no thread of the tests holds a lock then
        )
        os.close(slave)
        self.shown = ""  # since the last `until`

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text):
        os.write(self.master, text.encode())

    def until(self, pattern):
        """Wait for the terminal to show `pattern`; what it showed up to its end."""
        while (match := re.search(pattern, self.shown, re.DOTALL)) is None:
            piece = self._read()
            assert piece, f"no {pattern!r} in {self.shown!r}"
            self.shown += piece
        found, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return found

    def interrupt(self):
        """Type Ctrl-C at a prompt until it is seen.

        A signal that comes while readline takes in a key waits there for the next one.
        """
        for _ in range(PATIENCE):
            self.type("\x03")
            if select.select([self.master], [], [], 1)[0]:
                return
        raise AssertionError("Ctrl-C is not seen")

    def end(self):
        """Wait for the process to end; its exit code and what the terminal still showed."""
        while piece := self._read():
            self.shown += piece
        return self.process.wait(PATIENCE), self.shown

    def _read(self):
        """More of what is shown; nothing after the end, or if it takes too long."""
        if not select.select([self.master], [], [], PATIENCE)[0]:
            return ""
        try:
            return os.read(self.master, 65536).decode(errors="replace")
        except OSError as error:
            assert error.errno == errno.EIO  # how Linux says that nobody has it open
            return ""


if __name__ == "__main__":
    import dying

    from ds4mlx.cli import main as cli

    dying.Countdown(int(sys.argv[1]), int(sys.argv[2]))
    sys.exit(cli.run(sys.argv[3:]))
