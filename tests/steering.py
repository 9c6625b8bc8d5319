"""Generation made to do what a test needs: given tokens, given failures, Ctrl-C at a given point."""

import signal
import sys

import mlx.core as mx


class Dictation:
    """A sampler whose draws are given."""

    seed = penalties = None

    def __init__(self, tokens):
        self.tokens = iter(tokens)

    def __call__(self, logits, key):
        return mx.array([next(self.tokens)])


class Failing:
    """A sampler that fails at its n-th draw, as a device that runs out of memory may."""

    seed = penalties = None

    def __init__(self, last):
        self.left = last

    def __call__(self, logits, key):
        self.left -= 1
        if not self.left:
            raise RuntimeError("out of memory")
        return mx.argmax(logits, axis=-1)


class InterruptAt:
    """Ctrl-C at the n-th call or return of a function; counts them all if n is 0."""

    def __init__(self, number):
        self.number, self.count = number, 0

    def __enter__(self):
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _event(self, *_):
        self.count += 1
        if self.count == self.number:
            signal.raise_signal(signal.SIGINT)


def text_of(responses):
    return "".join(response.text for response in responses)


def tokens_of(responses):
    return [response.token for response in responses]
