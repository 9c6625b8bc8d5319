"""Ctrl-C between the steps of a model instead of inside one."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, where some layers' states are ahead of others'.

    It hardly waits longer for that: Python sees a signal only between MLX's evaluations anyway.
    """
    usual = signal.getsignal(signal.SIGINT)
    # Only the main thread is ever interrupted; None is a handler that Python cannot put back.
    if threading.current_thread() is not threading.main_thread() or usual is None:
        yield
        return
    waiting = []
    signal.signal(signal.SIGINT, lambda *_: waiting.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if waiting:
            signal.raise_signal(signal.SIGINT)
