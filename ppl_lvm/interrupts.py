"""Ctrl-C while a fit runs: the first one ends it between two steps, the second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Interrupt:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextlib.contextmanager
def noticed() -> Iterator[Interrupt]:
    """In this block the first Ctrl-C is noted, and the next ones raise KeyboardInterrupt as ever.

    Where Python's own handler is in place: a handler of the caller stays, and threads are not interrupted by Ctrl-C.
    """
    found = Interrupt()
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield found
        return

    def handle(number: int, frame: object) -> None:
        if found.asked:
            raise KeyboardInterrupt
        found.asked = True
        # No print: the signal may have come while the stream was being written to.
        with contextlib.suppress(OSError):
            os.write(2, b"\nInterrupted: the fit ends after the steps at hand. Ctrl-C again ends it at once.\n")

    signal.signal(signal.SIGINT, handle)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
