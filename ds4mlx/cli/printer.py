"""Streamed text as a person or a pipe gets it: the answer, and the reasoning told apart from it."""

import os
from typing import TextIO

from ds4mlx.cli.terminal import erase_line, waiting

THINK_END = "</think>"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
REASONING, ANSWER = "Reasoning:\n", "Answer:\n"


class Printer:
    """Writes streamed text, which begins with reasoning up to `</think>` where `reasoning` is set.

    The reasoning is shown if `shown` says so, by default on a terminal only. There it is dim and a
    blank line ends it; where nothing can be dim ($NO_COLOR, a dumb terminal, a pipe) the words
    `Reasoning:` and `Answer:` stand before the two. `</think>` itself is never written.
    """

    def __init__(self, out: TextIO, reasoning: bool, shown: bool | None = None):
        self.out, self.is_terminal = out, out.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.styled = self.is_terminal and not plain
        self.shown = self.is_terminal if shown is None else shown
        self.reasoning = reasoning  # whether what comes next is reasoning
        self._pending = ""  # of the reasoning: what may be the beginning of its end
        self._hidden = 0  # characters of reasoning that were not shown
        self._last = ""  # what was written last

    def write(self, text: str) -> None:
        """Show more text at once."""
        if self.reasoning:
            before, ended, text = (self._pending + text).partition(THINK_END)
            self._pending = "" if ended else _beginning_of_end(before)
            self._reason(before.removesuffix(self._pending))
            if ended:
                self._end_reasoning()
        self._put(text if not self.reasoning else "")
        self.out.flush()

    def close(self, interrupted: bool = False) -> None:
        """End the line, if one was begun, and the dimming if the reasoning was cut short.

        A terminal shows `^C` where an answer was interrupted, which begins a line too.
        """
        if self.reasoning:
            self._reason(self._pending)
            self._pending = ""
            if self._hidden:
                erase_line()
        begun = self._last and not self._last.endswith("\n")
        plain = self._plain() if self._last else ""
        self.out.write(plain + ("\n" if begun or (interrupted and self.is_terminal) else ""))
        self.out.flush()

    @property
    def withheld(self) -> bool:
        """Whether all of the text was reasoning that was not shown."""
        return self.reasoning and self._hidden > 0

    def _reason(self, text: str) -> None:
        if self.shown:
            begins = text and not self._last
            self._put((DIM if self.styled else REASONING) + text if begins else text)
        elif text:
            self._hidden += len(text)
            waiting(f"reasoning: {self._hidden:,} characters")

    def _end_reasoning(self) -> None:
        if self._last:
            self._put(f"{self._plain()}\n\n" if self.styled else f"\n\n{ANSWER}")
        if self._hidden:
            erase_line()
        self.reasoning = False

    def _put(self, text: str) -> None:
        if text:
            self._last = text  # first, as Ctrl-C may come once the text is out
            self.out.write(text)

    def _plain(self) -> str:
        return PLAIN if self.styled and self.reasoning else ""


def _beginning_of_end(text: str) -> str:
    """The longest end of a text that may be the beginning of `</think>`."""
    ends = (THINK_END[:length] for length in range(len(THINK_END) - 1, 0, -1))
    return next((end for end in ends if text.endswith(end)), "")
