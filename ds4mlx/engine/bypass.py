"""Whether drafting pays here: by the seconds that tokens took with drafts and without.

Time is cut into stretches with drafts or without. The first is without; then drafts are tried. They
stay when tokens have come faster by `GAIN`, and go when they come slower than without, so that a
draw keeps whatever is. Where they do not stay they are tried again later, each time twice as late.
"""

# Tokens of a stretch that do not count, since something may be compiled, and those that do.
WARM, COUNTED = 8, 32
# Tokens until another trial: after the first that fails, and at most. Stretches with drafts until
# the speed without is measured anew, as it changes with the depth.
PAUSE, LONGEST, RENEWED = 256, 8192, 32
GAIN = 1.05


class Bypass:
    """Says by `drafting` what to do next, and is told how long it took."""

    def __init__(self) -> None:
        self.drafting = False
        self._plain = 0.0  # seconds a token without drafts
        self._pause = PAUSE
        self._stretches = 0  # with drafts, since they were last not used
        self._begin(COUNTED)

    def _begin(self, counted: int) -> None:
        self._tokens, self._seconds, self._warm, self._end = 0, 0.0, 0, counted

    def took(self, tokens: int, seconds: float) -> None:
        """So many tokens have come as `drafting` said, in so many seconds."""
        if self._warm < WARM:
            self._warm += tokens
            return
        self._tokens += tokens
        self._seconds += seconds
        if self._tokens >= self._end:
            self._decide(self._seconds / self._tokens)

    def _decide(self, seconds: float) -> None:
        """A stretch has ended in which a token took so long."""
        if not self.drafting:
            self._plain, self.drafting, self._stretches = seconds, True, 0
            return self._begin(COUNTED)
        tried = self._stretches == 0
        self._stretches += 1
        if seconds * (GAIN if tried else 1) > self._plain:
            self.drafting, pause = False, self._pause
            self._pause = min(2 * pause, LONGEST)
            return self._begin(pause)
        self._pause = PAUSE
        self.drafting = self._stretches < RENEWED
        return self._begin(COUNTED)
