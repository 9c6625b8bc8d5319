"""Converts in a process that a signal ends just before, or inside, its n-th change to the disk.

python dying.py SOURCE TARGET N SIGNAL [RECIPE [MOMENTS]]: prints how many changes a whole conversion makes.
"""

import os
import sys

from ds4mlx.convert import convert

CHANGES = ("open", "write", "pwrite", "fsync", "ftruncate", "replace", "unlink")


class Countdown:
    """Wraps the functions that change the disk."""

    def __init__(self, last: int, number: int):
        self.last, self.number, self.count = last, number, 0
        for name in CHANGES:
            setattr(os, name, self.counted(getattr(os, name), torn=name in ("write", "pwrite")))

    def counted(self, function, torn: bool):
        def call(first, *rest, **options):
            self.count += 1
            if self.count == self.last:
                if torn:  # half of the bytes arrive
                    function(first, rest[0][: len(rest[0]) // 2], *rest[1:], **options)
                os.kill(os.getpid(), self.number)
            return function(first, *rest, **options)

        return call


if __name__ == "__main__":
    source, target, last, number, *rest = sys.argv[1:]
    options = dict(zip(("recipe", "moments"), rest, strict=False))
    countdown = Countdown(int(last), int(number))
    convert(source, target, **options, max_memory=1 << 14, progress=False, journal_seconds=0)
    print(countdown.count)
