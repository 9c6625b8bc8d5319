"""Bounds on what reading a hostile file may take."""

import contextlib
import resource
import signal
from pathlib import Path

SECONDS, MEMORY = 10, 1 << 30


@contextlib.contextmanager
def bounded():
    """A hang, or an allocation of more than a gigabyte, is an error."""

    def late(*_):
        raise TimeoutError

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
