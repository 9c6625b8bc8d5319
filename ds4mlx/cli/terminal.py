"""What a person sees beside a text: notes, and progress that changes in place and vanishes."""

import os
import sys

ERASE = "\r\x1b[K"


def note(text: str) -> None:
    """A line on stderr that is no result."""
    print(text, file=sys.stderr)


def progress(what: str, unit: str, done: int, total: int) -> None:
    """A line on a terminal's stderr that changes in place and vanishes when all is done."""
    if done < total:
        waiting(f"{what}: {done:,} of {total:,} {unit}")
    else:
        erase_line()


def waiting(text: str) -> None:
    """The same with any text; `erase_line` makes it vanish."""
    erase_line()
    if _can_erase():
        sys.stderr.write(text)
        sys.stderr.flush()


def erase_line() -> None:
    """Remove what `progress` left; nothing where it writes nothing."""
    if _can_erase():
        sys.stderr.write(ERASE)
        sys.stderr.flush()


def _can_erase() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
