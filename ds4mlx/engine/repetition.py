"""A guard against answers that repeat themselves without end."""

import numpy as np

# The end of an answer that is one piece of up to LONGEST tokens, over and over: TIMES times, and
# for LEAST tokens at least, so that tables of zeros and rulers of dashes may pass.
LONGEST, TIMES, LEAST = 256, 8, 512


class Repetition:
    """Tells when a text has begun to go round in circles; a few microseconds a token."""

    def __init__(self) -> None:
        self._last = np.full(LONGEST, -1, np.int64)  # the latest token first
        self._runs = np.zeros(LONGEST, np.int64)  # tokens in a row that equal the one n+1 before
        self._enough = np.maximum(np.arange(1, LONGEST + 1) * (TIMES - 1), LEAST)

    def add(self, token: int) -> bool:
        """Take the next token; whether the text repeats itself now."""
        self._runs = np.where(self._last == token, self._runs + 1, 0)
        self._last = np.concatenate([[token], self._last[:-1]])
        return bool(np.any(self._runs >= self._enough))
