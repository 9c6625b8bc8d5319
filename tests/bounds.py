"""Bounds on what reading a hostile file may take."""

import contextlib
import resource
import signal
from pathlib import Path

SECONDS, MEMORY = 10, 1 << 30
STATM = Path("/proc/self/statm")  # Linux has it, and minds the limit


@contextlib.contextmanager
def bounded():
    """A hang, or on Linux an allocation of more than a gigabyte, is an error."""

    def late(*_):
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with limited_memory() if STATM.exists() else contextlib.nullcontext():
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def limited_memory():
    size = int(STATM.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
