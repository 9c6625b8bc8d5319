"""Converts in a process that a signal ends just before, or inside, its n-th change to the disk.

python dying.py SOURCE TARGET N SIGNAL [RECIPE [MOMENTS [BUDGET]]]: prints how many changes to the disk a
whole conversion makes.
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
    options = {k: v or None for k, v in zip(("recipe", "moments"), rest, strict=False)}
    budget = int(rest[2]) if rest[2:] else None
    countdown = Countdown(int(last), int(number))
    hasty = {"max_memory": 1 << 14, "progress": False, "journal_seconds": 0}
    convert(source, target, **options, budget=budget, **hasty)
    print(countdown.count)
